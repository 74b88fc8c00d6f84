"""Which cache a cache extends."""

from collections.abc import Iterator

from .activation_cache import ActivationCache

EXTENDS = "extends"
"""Key of the manifest's `extra`: id of the cache whose rows come first."""


def open_ancestor(cache: ActivationCache) -> ActivationCache | None:
    """The cache that `cache` extends, if it is still there and has all its arrays."""
    name = cache.manifest.extra.get(EXTENDS)
    path = cache.path.parent / str(name)
    if name is None or not (path / "manifest.json").is_file():
        return None
    found = ActivationCache(path)
    return found if found.complete_names.issuperset(cache.target_names) else None


def cache_lineage(cache: ActivationCache) -> Iterator[ActivationCache]:
    """The caches that `cache` extends, the latest first, as far as they are still there."""
    while (name := cache.manifest.extra.get(EXTENDS)) is not None:
        path = cache.path.parent / name
        if not (path / "manifest.json").is_file():
            return
        cache = ActivationCache(path)
        yield cache
