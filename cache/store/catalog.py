"""The caches under a root: where the root is, which caches it has, which one a name means."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import NotFoundError, ResiduaError, UsageError
from ..files.paths import as_path, list_folder
from .activation_cache import SHORT_ID, ActivationCache


def cache_root(root: str | Path | None = None) -> Path:
    """`root`, a folder or a URL, else $RESIDUA_ROOT, else `residua` in the user's XDG cache."""
    if root is not None:
        return as_path(root)
    if named := os.environ.get("RESIDUA_ROOT"):
        return as_path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "residua"


def list_paths(root: Path) -> list[Path]:
    """Folders of all caches under `root`, oldest first; nothing is read."""
    found = [p / "manifest.json" for p in list_folder(root) if not p.name.startswith(".")]
    written: list[tuple[float, Path]] = []
    for manifest in found:
        with suppress(FileNotFoundError):  # a cache that is being removed
            if manifest.is_file():
                written.append((manifest.stat().st_mtime, manifest))
    return [manifest.parent for _, manifest in sorted(written)]


def find_path(name: str, root: Path) -> Path:
    """Folder of the cache whose id begins with `name`, or the path `name` itself.

    Raises `NotFoundError` if there is none and `UsageError` if several ids begin so.
    """
    path = as_path(name)
    if (path / "manifest.json").is_file():
        return path
    paths = list_paths(root)
    found = [path for path in paths if name and path.name.startswith(name)]
    if len(found) > 1:
        ids = ", ".join(path.name[:SHORT_ID] for path in found)
        raise UsageError(f"{name!r} begins the ids of {len(found)} caches: {ids}; give more of it")
    if not found:
        ids = ", ".join(path.name[:SHORT_ID] for path in paths) or "none"
        raise NotFoundError(
            f"no cache {name!r} under {root} (there: {ids}); give a prefix of an id, or a path"
        )
    return found[0]


def find_cache(name: str, root: Path) -> ActivationCache:
    """The cache that `find_path` finds, opened."""
    return ActivationCache(find_path(name, root))


def list_caches(root: Path) -> list[dict[str, Any]]:
    """A summary of every cache under `root`; a damaged one is listed with what is wrong."""
    return [_summary(path) for path in list_paths(root)]


def _summary(path: Path) -> dict[str, Any]:
    try:
        cache = ActivationCache(path)
        state = "complete" if cache.complete else f"{len(cache.committed)} of {cache.n_parts} parts"
        return {
            "cache": cache.id,
            "model": cache.manifest.model_name,
            "data": cache.manifest.data_name,
            "positions": cache.positions,
            "sequences": cache.manifest.tokens.sequences,
            "layers": list(cache.layers),
            "d_model": cache.d_model,
            "bytes": cache.bytes,
            "state": state,
            "path": str(path),
        }
    except ResiduaError as error:
        empty = dict.fromkeys(("model", "data", "positions", "sequences", "d_model"))
        state = f"damaged: {error}"
        return {
            "cache": path.name,
            **empty,
            "layers": [],
            "bytes": 0,
            "state": state,
            "path": str(path),
        }


def describe_cache(cache: ActivationCache) -> dict[str, Any]:
    """Everything that is known of `cache` without reading its arrays."""
    from ..files.json_files import read_json
    from .local_origin import read_origin

    manifest = cache.manifest
    splits = {name: len(cache.sequences(name)) for name in ("train", "validation", "test")}
    layers = {}
    for layer in cache.target_layers:
        name = f"residual/{layer}"
        records = [r.arrays[name] for r in cache.committed.values() if name in r.arrays]
        layers[str(layer)] = {
            "dtype": cache.array(f"residual/{layer}").layout.logical_dtype,
            "absmax": max((record.absmax for record in records), default=None),
            "nonfinite": sum(record.nonfinite for record in records),
        }
    return {
        **_summary(cache.path),
        "vocab": manifest.vocab,
        "depth": manifest.depth,
        "splits": splits,
        "identity": manifest.identity,
        "layout": manifest.layout.to_json(),
        "batch_tokens": manifest.batch_tokens,
        "layer_arrays": layers,
        "logits": manifest.capture.logits,
        "codec": manifest.codec,
        "alone": manifest.alone,
        "head": {**cache.head.describe(), "geometry": cache.head.digest},
        "provenance": read_json(cache.path / "provenance.json"),
        "origin": read_origin(cache.path),
    }  # fmt: skip
