"""Shared by all probes: the Readout protocol, parameters, arguments, resources."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .arguments import LABELS as LABELS
    from .arguments import as_array as as_array
    from .arguments import check_dask as check_dask
    from .arguments import check_labels as check_labels
    from .arguments import distinct_labels as distinct_labels
    from .arguments import is_dask as is_dask
    from .arguments import validated as validated
    from .arguments import warn_unvalidated as warn_unvalidated
    from .estimator import BaseEstimator as BaseEstimator
    from .estimator import ClassifierMixin as ClassifierMixin
    from .estimator import MultiOutputMixin as MultiOutputMixin
    from .estimator import RegressorMixin as RegressorMixin
    from .fitted_maps import FittedMaps as FittedMaps
    from .fitted_maps import MapKey as MapKey
    from .fitted_probe import FittedProbe as FittedProbe
    from .pair_offsets import check_pair_offsets as check_pair_offsets
    from .params import Params as Params
    from .readout import LayerOffset as LayerOffset
    from .readout import Readout as Readout
    from .readout import ReadoutBatch as ReadoutBatch
    from .resources import ProgressCounter as ProgressCounter
    from .resources import available_cores as available_cores
    from .resources import default_memory as default_memory
    from .resources import one_blas_thread as one_blas_thread
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
