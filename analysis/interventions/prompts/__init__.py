"""Prompts that read cached states, measured: what a state says of later tokens, and a picture."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .passage_picture import read_passage as read_passage
    from .prompt_study import study_prompts as study_prompts
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
