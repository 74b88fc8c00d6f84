"""The head of a model (final norm, unembedding): read off it, kept as data, run without it."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .head import Head as Head
    from .head import TorchHead as TorchHead
    from .head_identification import SMALL_STD as SMALL_STD
    from .head_identification import identify_head as identify_head
    from .head_identification import scale_to_std as scale_to_std
    from .head_identification import verify_head as verify_head
    from .head_recording import record_head as record_head
    from .program_head import ProgramHead as ProgramHead
    from .saved_head import load_head as load_head
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
