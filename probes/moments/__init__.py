"""Second moments of (layer, offset, target): planned, summed, merged, kept with the cache."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .moment_collection import check_rows as check_rows
    from .moment_collection import collect_moments as collect_moments
    from .moment_collection import moments_of_rows as moments_of_rows
    from .moment_set import MomentSet as MomentSet
    from .moment_sources import MomentSources as MomentSources
    from .moment_sources import obtain_moments as obtain_moments
    from .moments import PRODUCTS as PRODUCTS
    from .moments import Moments as Moments
    from .moments import merge_all as merge_all
    from .pass_plan import MomentRequest as MomentRequest
    from .shifted_sums import LayerOffsetTarget as LayerOffsetTarget
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
