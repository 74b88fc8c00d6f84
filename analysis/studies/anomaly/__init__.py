"""Anomalous documents, such as prompt injections, by trajectories of lenses and by states."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .anomaly_study import study_anomaly as study_anomaly
    from .detectors import MahalanobisDistance as MahalanobisDistance
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
