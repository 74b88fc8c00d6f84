"""Studies: what the probes of a cache say about one question, as tables, a figure and a page."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .essential_layers import EssentialLayers as EssentialLayers
    from .essential_layers import study_essential_layers as study_essential_layers
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
