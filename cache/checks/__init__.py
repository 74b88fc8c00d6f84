"""Measurements of a model before a row is kept, and again on resume."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .compression_ratio import measure_compression_ratio as measure_compression_ratio
    from .independence import Independence as Independence
    from .independence import lowest_dtype as lowest_dtype
    from .model_checks import ModelReport as ModelReport
    from .model_checks import check_model as check_model
    from .model_checks import independence_of as independence_of
    from .model_checks import measure_value_ranges as measure_value_ranges
    from .model_checks import recheck_model as recheck_model
    from .reference_rows import check_reference_rows as check_reference_rows
    from .reference_rows import save_reference_rows as save_reference_rows
    from .resume_check import ResumeReport as ResumeReport
    from .resume_check import check_cached_logits as check_cached_logits
    from .resume_check import check_resume as check_resume
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
