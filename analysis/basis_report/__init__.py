"""Causal bases as an HTML page and pictures."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .basis_page import write_basis_png as write_basis_png
    from .basis_page import write_basis_report as write_basis_report
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
