"""Softmax regression from a residual stream to the token N further on."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .mlp_probe import MlpProbe as MlpProbe
    from .vocab_probe import VocabProbe as VocabProbe
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
