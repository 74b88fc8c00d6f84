"""What scripts and notebooks show: data frames, plots, objects as HTML, heatmaps of lenses."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .evaluation_plots import future_lens_figure as future_lens_figure
    from .evaluation_plots import plot_evaluation as plot_evaluation
    from .frames import data_frame as data_frame
    from .lens_maps import CachePassage as CachePassage
    from .lens_maps import LensMap as LensMap
    from .lens_maps import LensMaps as LensMaps
    from .lens_maps import read_lens_maps as read_lens_maps
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
