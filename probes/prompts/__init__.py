"""Prompts that take a cached state at their last position: written ones, and learned embeddings."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .learned_prompt import LearnedPrompt as LearnedPrompt
    from .patched_prompt import FIXED_PROMPTS as FIXED_PROMPTS
    from .patched_prompt import PatchedPrompt as PatchedPrompt
    from .patched_prompt import read_prompt as read_prompt
    from .prompt_runner import PromptRunner as PromptRunner
    from .prompt_sample import PromptSample as PromptSample
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
