"""Lineage: the caches of fewer tokens that a cache extends.

`add_tokens` notes the id of the extended cache in the manifest; extraction copies rows from that
cache, and probes take over the moments kept with it.
"""

from collections.abc import Iterator

from .activation_cache import ActivationCache

EXTENDS = "extends"
"""Key of the manifest's `extra`: id of the extended cache, whose rows come first."""


def open_ancestor(cache: ActivationCache) -> ActivationCache | None:
    """The cache that `cache` extends; None if it was removed or lacks an array of `cache`."""
    ancestor = next(cache_lineage(cache), None)
    if ancestor is None or not ancestor.complete_names.issuperset(cache.target_names):
        return None
    return ancestor


def cache_lineage(cache: ActivationCache) -> Iterator[ActivationCache]:
    """The caches that `cache` extends, latest first, up to the first that was removed."""
    while (cache_id := cache.manifest.extra.get(EXTENDS)) is not None:
        path = cache.path.parent / str(cache_id)
        if not (path / "manifest.json").is_file():
            return
        cache = ActivationCache(path)
        yield cache
