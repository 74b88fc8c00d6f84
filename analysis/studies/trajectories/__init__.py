"""Prediction trajectories: what lenses say at every layer of sampled positions, in one pass."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .position_sample import PositionSample as PositionSample
    from .position_sample import choose_positions as choose_positions
    from .readings import Trajectories as Trajectories
    from .readings import measure_trajectories as measure_trajectories
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
