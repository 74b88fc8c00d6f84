"""Finds caches: the root folder, the caches under a root, and the cache that a name means.

`find_cache("3f9c", cache_root())` opens a cache by the beginning of its id; `list_caches` and
`describe_cache` give what `residua ls` and `residua info` print.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import NotFoundError, ResiduaError, UsageError
from ..files.paths import as_path, is_remote, list_folder
from .activation_cache import SHORT_ID, ActivationCache


def cache_root(root: str | Path | None = None) -> Path:
    """The root: `root` (a folder or a URL), else $RESIDUA_ROOT, else ~/.cache/residua.

    $XDG_CACHE_HOME, if set, takes the place of ~/.cache. Raises `UsageError` for a root that is,
    or lies in, a file or a link to nothing; a folder need not exist.
    """
    if root is not None:
        return _checked_root(as_path(root))
    if environment_root := os.environ.get("RESIDUA_ROOT"):
        return _checked_root(as_path(environment_root))
    xdg_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg_cache) if xdg_cache else Path.home() / ".cache") / "residua"


def _checked_root(root: Path) -> Path:
    """`root`; raises `UsageError` if no folder can be there."""
    if is_remote(root):
        return root
    nearest = next((path for path in (root, *root.parents) if os.path.lexists(path)), None)
    if nearest is not None and not nearest.is_dir():
        kind = "a link to nothing" if not nearest.exists() else "a file"
        raise UsageError(f"the root {root} cannot be used: {nearest} is {kind}; name a folder")
    return root


def list_paths(root: Path) -> list[Path]:
    """Folders of all caches under `root`, oldest first; no file is opened."""
    manifests = [p / "manifest.json" for p in list_folder(root) if not p.name.startswith(".")]
    by_time: list[tuple[float, Path]] = []
    for manifest in manifests:
        with suppress(FileNotFoundError):  # a cache that is being removed
            if manifest.is_file():
                by_time.append((manifest.stat().st_mtime, manifest))
    return [manifest.parent for _, manifest in sorted(by_time)]


def find_path(name: str | Path, root: str | Path) -> Path:
    """Folder of the cache whose id begins with `name`; or `name`, if that is a cache's path.

    Raises `NotFoundError` if no id begins with `name`, and `UsageError` if several do.
    """
    path, root, name = as_path(name), as_path(root), str(name)
    if (path / "manifest.json").is_file():
        return path
    paths = list_paths(root)
    matches = [path for path in paths if name and path.name.startswith(name)]
    if len(matches) > 1:
        ids = ", ".join(path.name[:SHORT_ID] for path in matches)
        raise UsageError(
            f"{name!r} begins the ids of {len(matches)} caches: {ids}; give more of it"
        )
    if not matches:
        ids = ", ".join(path.name[:SHORT_ID] for path in paths) or "none"
        raise NotFoundError(
            f"no cache {name!r} under {root} (there: {ids}); give a prefix of an id, or a path"
        )
    return matches[0]


def find_cache(name: str | Path, root: str | Path) -> ActivationCache:
    """Open the cache whose id begins with `name`, or at the path `name`; see `find_path`."""
    return ActivationCache(find_path(name, root))


def list_caches(root: str | Path) -> list[dict[str, Any]]:
    """JSON objects of all caches under `root`; the state of a damaged cache says the error."""
    return [_summary(path) for path in list_paths(as_path(root))]


def _summary(path: Path) -> dict[str, Any]:
    """The JSON object of one cache in `residua ls`."""
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
        unknown = dict.fromkeys(("model", "data", "positions", "sequences", "d_model"))
        return {
            "cache": path.name,
            **unknown,
            "layers": [],
            "bytes": 0,
            "state": f"damaged: {error}",
            "path": str(path),
        }


def describe_cache(cache: ActivationCache) -> dict[str, Any]:
    """The JSON object of `residua info`: all facts about `cache` that need no reading of rows."""
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
    }
