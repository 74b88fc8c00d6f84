"""An evaluation as an HTML report, pictures and tables."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .html_report import write_pngs as write_pngs
    from .html_report import write_report as write_report
    from .tables import offset_tables as offset_tables
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
