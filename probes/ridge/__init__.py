"""Ridge regression from moments."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .error_share import ErrorShare as ErrorShare
    from .error_share import domination_message as domination_message
    from .error_share import error_shares as error_shares
    from .error_share import warn_of_domination as warn_of_domination
    from .ridge_probe import RidgeProbe as RidgeProbe
    from .solver import AffineMap as AffineMap
    from .solver import fit_ridge as fit_ridge
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
