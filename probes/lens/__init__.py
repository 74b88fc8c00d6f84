"""Logit lens, tuned lens, future lens, Jacobian lens."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .jacobian_lens import JacobianLens as JacobianLens
    from .logit_lens import LogitLens as LogitLens
    from .tuned_lens import FutureLens as FutureLens
    from .tuned_lens import TunedLens as TunedLens
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
