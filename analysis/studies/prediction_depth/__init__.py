"""Prediction depth: the layers that predictions take, and what goes with it."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .prediction_depth_study import study_prediction_depth as study_prediction_depth
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
