"""Analysis: measures of probes on held-out text, reports, pictures, and the command line."""

from typing import TYPE_CHECKING

from ..cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .evaluation.probe_evaluation import evaluate as evaluate
    from .evaluation.result import Evaluation as Evaluation
    from .report.html_report import write_pngs as write_pngs
    from .report.html_report import write_report as write_report
    from .report.tables import offset_tables as offset_tables
    from .token_texts.position_masks import name_mask as name_mask
    from .token_texts.position_masks import word_continuation_mask as word_continuation_mask
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
