"""The mean Jacobian from every layer to the last one, by running the model's blocks backward."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .jacobian_fit import fit_jacobian_lens as fit_jacobian_lens
    from .jacobian_sums import JacobianSums as JacobianSums
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
