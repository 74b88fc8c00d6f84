"""Results of studies: tables, figures, pages and files, the same for every study."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .study_figures import HeatPanel as HeatPanel
    from .study_figures import Panel as Panel
    from .study_figures import Series as Series
    from .study_figures import StudyFigure as StudyFigure
    from .study_result import StudyResult as StudyResult
    from .study_result import StudySubject as StudySubject
    from .study_result import StudyTable as StudyTable
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
