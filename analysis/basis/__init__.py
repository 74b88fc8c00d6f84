"""What causal bases say: readable directions, and their influence in the model itself."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .model_influence import ModelInfluence as ModelInfluence
    from .model_influence import measure_model_influence as measure_model_influence

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
