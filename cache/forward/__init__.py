"""Forward passes over the parts of a cache: batches, device to host, writer."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .batches import BATCH_TOKENS as BATCH_TOKENS
    from .batches import choose_batch_tokens as choose_batch_tokens
    from .batches import group_sequences as group_sequences
    from .device_copies import copy_to_host as copy_to_host
    from .kept_logits import KeptLogits as KeptLogits
    from .kept_logits import StoredRows as StoredRows
    from .part_extraction import PartExtraction as PartExtraction
    from .part_runner import PartRunner as PartRunner
    from .stage_times import StageTimes as StageTimes
    from .write_parts import done_positions as done_positions
    from .write_parts import missing_parts as missing_parts
    from .write_parts import write_missing_parts as write_missing_parts
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
