"""In-context learning: precision ahead of the text by layer, offset and number of shots."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .shot_study import study_in_context as study_in_context
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
