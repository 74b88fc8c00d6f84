"""Finds caches: the root folder, the caches under a root, and the cache that a name means.

`find_cache("3f9c", cache_root())` opens a cache by the beginning of its id; `list_caches` and
`describe_cache` give what `residua ls` and `residua info` print.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

from ..errors import NotFoundError, ResiduaError, UnreachableError, UsageError
from ..files.confined_files import read_confined_json
from ..files.paths import as_path, is_remote, list_folder
from ..http.served_path import is_served, served_root
from .activation_cache import SHORT_ID, ActivationCache

UNREADABLE = (ResiduaError, OSError, ArithmeticError, MemoryError, RecursionError, ValueError)
"""Errors that a damaged or forged cache, or its disk, may cause where the cache is opened."""


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
    if is_served(root):
        return served_root(root)
    if is_remote(root):
        return root
    nearest = next((path for path in (root, *root.parents) if os.path.lexists(path)), None)
    if nearest is not None and not nearest.is_dir():
        kind = "a link to nothing" if not nearest.exists() else "a file"
        raise UsageError(f"the root {root} cannot be used: {nearest} is {kind}; name a folder")
    return root


def list_paths(root: Path) -> list[Path]:
    """Folders of all caches under `root`, oldest first; no file is opened.

    A folder that cannot be looked into counts as a cache, which opening it finds damaged.
    """
    by_time: list[tuple[float, Path]] = []
    for path in list_folder(root):
        if path.name.startswith("."):
            continue
        try:
            if (time := _manifest_time(path)) is not None:
                by_time.append((time, path))
        except FileNotFoundError:  # a cache that is being removed
            continue
        except PermissionError:
            by_time.append((0.0, path))
    return [path for _, path in sorted(by_time)]


def _manifest_time(path: Path) -> float | None:
    """Time of the manifest in the folder `path`, whatever kind of file it is; None without one."""
    manifest = path / "manifest.json"
    if is_remote(path):
        try:
            return manifest.stat().st_mtime
        except FileNotFoundError:
            return None
    try:
        status = os.lstat(manifest)
    except NotADirectoryError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime


def _list_lost(root: Path) -> list[Path]:
    """Folders of caches on disk that have lost their manifest: named by an id, with a journal."""
    if is_remote(root):
        return []
    folders = [path for path in list_folder(root) if re.fullmatch(r"[0-9a-f]{64}", path.name)]
    return sorted(path for path in folders if _has_lost_manifest(path))


def _has_lost_manifest(path: Path) -> bool:
    """Whether the folder `path` is a cache without a manifest."""
    try:
        has_journal = os.path.lexists(path / "journal" / "base.json")
        return has_journal and not os.path.lexists(path / "manifest.json")
    except OSError:
        return False


def find_path(name: str | Path, root: str | Path) -> Path:
    """Folder of the cache whose id begins with `name`; or `name`, if that is a cache's path.

    Raises `NotFoundError` if no id begins with `name`, and `UsageError` if several do.
    """
    path, root, name = as_path(name), as_path(root), str(name)
    if _is_cache(path):
        return path
    paths = [*list_paths(root), *_list_lost(root)]
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


def _is_cache(path: Path) -> bool:
    """Whether `path` is a cache, with or without its manifest."""
    if is_remote(path):
        return (path / "manifest.json").is_file()
    return os.path.lexists(path / "manifest.json") or _has_lost_manifest(path)


def find_cache(name: str | Path, root: str | Path) -> ActivationCache:
    """Open the cache whose id begins with `name`, or at the path `name`; see `find_path`."""
    return ActivationCache(find_path(name, root))


def open(name: str | Path, root: str | Path | None = None) -> ActivationCache:
    """Open a cache by its path, or by the beginning of its id under `root`; as `residua.open`.

    `root` defaults to that of `extract`: $RESIDUA_ROOT, else the XDG cache folder. Raises
    `NotFoundError` where no cache is, and `UsageError` if several ids begin with `name` or the
    folder holds a probe.
    """
    path = as_path(name)
    if not _is_cache(path) and (path / "probe.safetensors").is_file():
        raise UsageError(f"{path} holds a probe, not a cache; read it with residua.load_probe")
    return find_cache(name, cache_root(root))


def list_caches(root: str | Path) -> list[dict[str, Any]]:
    """JSON objects of all caches under `root`; the state of a damaged cache says the error."""
    root = as_path(root)
    return [_summary(path) for path in (*list_paths(root), *_list_lost(root))]


def _summary(path: Path) -> dict[str, Any]:
    """The JSON object of one cache in `residua ls`."""
    try:
        cache = ActivationCache(path)
        cache.journal.base()  # raises if a record of it is damaged
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
    except UnreachableError:
        raise
    except UNREADABLE as error:
        unknown = dict.fromkeys(("model", "data", "positions", "sequences", "d_model"))
        return {
            "cache": path.name,
            **unknown,
            "layers": [],
            "bytes": 0,
            "state": f"damaged: {error or type(error).__name__}",
            "path": str(path),
        }


def describe_cache(cache: ActivationCache) -> dict[str, Any]:
    """The JSON object of `residua info`: all facts about `cache` that need no reading of rows.

    The head's tensors are not read; `geometry`, their digest, is the one that was recorded when the
    cache was made, None in caches that were made before.
    """
    from ..head.saved_head import describe_head
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
    provenance = read_confined_json(cache.path, "provenance.json")
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
        "head": {**describe_head(cache.path / "head"), "geometry": provenance.get("geometry")},
        "provenance": provenance,
        "origin": read_origin(cache.path),
    }
