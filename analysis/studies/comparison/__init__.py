"""Two caches beside each other: lenses carried from one to the other, models compared."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .depth_curves import compare_by_depth as compare_by_depth
    from .lens_transfer import study_transfer as study_transfer
    from .model_comparison import study_compare as study_compare
    from .two_models import compare_two_models as compare_two_models
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
