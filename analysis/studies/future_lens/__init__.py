"""Study `future-lens`: what a layer says of the tokens after the next one."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .pair_filters import KEEPS as KEEPS
    from .study_offsets import study_future_lens as study_future_lens
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
