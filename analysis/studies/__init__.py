"""Studies: what the probes of a cache say about one question, as tables, figures and a page."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .all_studies import AllStudies as AllStudies
    from .all_studies import run_all_studies as run_all_studies
    from .study_registry import STUDIES as STUDIES
    from .study_registry import StudyEntry as StudyEntry
    from .study_registry import study as study
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
