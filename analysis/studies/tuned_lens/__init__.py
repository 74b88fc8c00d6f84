"""Quality of lenses by layer, drift between layers, and the refinement of guesses."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .lens_quality import study_tuned_lens as study_tuned_lens
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
