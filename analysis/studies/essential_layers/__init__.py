"""Essential layers (2501.15054): where an answer first appears among the layers, and stays."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .depth_study import study_essential_layers as study_essential_layers
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
