"""What causal bases say: readable directions, and their influence in the model itself."""

from ...cache.lazy_exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
