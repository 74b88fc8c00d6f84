"""The text of tokens: labels for people, and masks of positions inside words and names."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .position_masks import MASKS as MASKS
    from .position_masks import name_mask as name_mask
    from .position_masks import word_continuation_mask as word_continuation_mask
    from .token_names import TokenNames as TokenNames
    from .token_names import token_of_text as token_of_text
    from .token_names import visible as visible
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
