"""The model: files, tokenizer, loading, decoder blocks."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .block_search import find_blocks as find_blocks
    from .blocks import DecoderBlocks as DecoderBlocks
    from .blocks import logits_of as logits_of
    from .blocks import run_model as run_model
    from .model_loading import load_model as load_model
    from .resume import ResumableRun as ResumableRun
    from .source import ModelSource as ModelSource
    from .tokenizer import tokenizer_digest as tokenizer_digest
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
