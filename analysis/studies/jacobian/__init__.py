"""Jacobian lenses beside the logit lens and fitted lenses."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .jacobian_study import study_jacobian as study_jacobian
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
