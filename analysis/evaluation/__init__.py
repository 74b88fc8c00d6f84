"""Measures of probes on held-out text, as plain data."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .confidence_buckets import BUCKETS as BUCKETS
    from .confidence_buckets import BucketRow as BucketRow
    from .confidence_buckets import bucket_name as bucket_name
    from .lens_heatmap import Heatmap as Heatmap
    from .metrics import KS as KS
    from .metrics import EvaluationRow as EvaluationRow
    from .metrics import format_measure as format_measure
    from .metrics import kl_sort_key as kl_sort_key
    from .metrics import precision_sort_key as precision_sort_key
    from .probe_evaluation import evaluate as evaluate
    from .probe_names import ProbeName as ProbeName
    from .result import Evaluation as Evaluation
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
