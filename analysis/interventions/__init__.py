"""Interventions: the model run on from cached layers of which rows were changed."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .prompts.prompt_study import study_prompts as study_prompts
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
