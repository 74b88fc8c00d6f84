"""A model resumed from any layer of the residual stream, without the blocks below."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .model_resuming import load_model as load_model
    from .resumable_model import ResumableModel as ResumableModel
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
