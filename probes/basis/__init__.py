"""Causal bases: directions of a layer that change a lens's predictions most when ablated."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .causal_basis import CausalBasis as CausalBasis
    from .causal_basis import lens_maps as lens_maps
    from .layer_basis import LayerBasis as LayerBasis
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
