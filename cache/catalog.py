"""The caches under a root: where the root is, which caches it has, which one a name means."""

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import NotFoundError, UsageError
from .store import SHORT_ID, ActivationCache


def cache_root(root: str | Path | None = None) -> Path:
    """`root`, else $RESIDUA_ROOT, else the folder `residua` in the user's XDG cache folder."""
    if root is not None:
        return Path(root).expanduser()
    if named := os.environ.get("RESIDUA_ROOT"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "residua"


def list_caches(root: Path) -> Iterator[ActivationCache]:
    """Every cache under `root`, oldest first."""
    if not root.is_dir():
        return
    manifests = [path / "manifest.json" for path in root.iterdir() if not path.name.startswith(".")]
    for manifest in sorted((m for m in manifests if m.is_file()), key=lambda m: m.stat().st_mtime):
        yield ActivationCache(manifest.parent)


def find_cache(name: str, root: Path) -> ActivationCache:
    """The cache whose id begins with `name`, or the one at the path `name`.

    Raises `NotFoundError` if there is none and `UsageError` if several ids begin so.
    """
    if (Path(name).expanduser() / "manifest.json").is_file():
        return ActivationCache(Path(name).expanduser())
    found = [cache for cache in list_caches(root) if cache.id.startswith(name)] if name else []
    if len(found) > 1:
        ids = ", ".join(cache.id[:SHORT_ID] for cache in found)
        raise UsageError(f"{name!r} begins the ids of {len(found)} caches: {ids}; give more of it")
    if not found:
        ids = ", ".join(cache.id[:SHORT_ID] for cache in list_caches(root)) or "none"
        raise NotFoundError(
            f"no cache {name!r} under {root} (there: {ids}); give a prefix of an id, or a path"
        )
    return found[0]
