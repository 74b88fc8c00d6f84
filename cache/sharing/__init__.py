"""Caches for others: plain files, other roots, dataset repositories of the hub, their cards."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .dataset_card import NO_LICENCE as NO_LICENCE
    from .flat_export import export as export
    from .hub import PushedCache as PushedCache
    from .hub import pull_cache as pull_cache
    from .hub import push_cache as push_cache
    from .hub_errors import translate_hub_errors as translate_hub_errors
    from .root_transfer import copy_cache as copy_cache
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
