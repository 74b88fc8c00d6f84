"""What causal bases say: readable directions, and their influence in the model itself."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .direction_passages import Passage as Passage
    from .direction_readings import DirectionReading as DirectionReading
    from .direction_readings import LayerReading as LayerReading
    from .direction_readings import read_directions as read_directions
    from .layer_persistence import DirectionMatch as DirectionMatch
    from .model_influence import ModelInfluence as ModelInfluence
    from .model_influence import measure_model_influence as measure_model_influence
    from .token_changes import TokenChange as TokenChange
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
