"""Lineage: the caches of fewer tokens that a cache extends.

`add_tokens` notes the id of the extended cache in the manifest; extraction copies rows from that
cache, and probes take over the moments kept with it.
"""

from collections.abc import Iterator

from ..errors import CorruptError
from ..format.manifest import EXTENDS, SHORT_ID
from .activation_cache import ActivationCache


def open_ancestor(cache: ActivationCache) -> ActivationCache | None:
    """The cache that `cache` extends; None if it was removed or lacks an array of `cache`."""
    ancestor = next(cache_lineage(cache), None)
    if ancestor is None or not ancestor.complete_names.issuperset(cache.target_names):
        return None
    return ancestor


def cache_lineage(cache: ActivationCache) -> Iterator[ActivationCache]:
    """The caches that `cache` extends, latest first, up to the first that was removed.

    Each has fewer positions than the one before. Raises `CorruptError` for another, which is how
    forged manifests extend each other in a circle.
    """
    while (cache_id := cache.manifest.extra.get(EXTENDS)) is not None:
        path = cache.path.parent / cache_id
        if not (path / "manifest.json").is_file():
            return
        ancestor = ActivationCache(path)
        if ancestor.positions >= cache.positions or ancestor.id != cache_id:
            raise CorruptError(
                f"{cache.path} says that it extends {path}, which is no earlier cache of fewer "
                f"tokens ({ancestor.positions} of {cache.positions} positions, id "
                f"{ancestor.id[:SHORT_ID]}); one of the two was forged: extract it again"
            )
        cache = ancestor
        yield cache
