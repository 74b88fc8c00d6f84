"""Run a frozen language model once, keep its residual streams, fit every probe from the cache."""

from typing import TYPE_CHECKING

from .cache.lazy_exports import lazy_exports
from .cache.optional_libraries import name_extras

if TYPE_CHECKING:
    from .analysis.basis.direction_readings import read_directions as read_directions
    from .analysis.basis.model_influence import (
        measure_model_influence as measure_model_influence,
    )
    from .analysis.basis_report.basis_page import write_basis_report as write_basis_report
    from .analysis.display.lens_maps import CachePassage as CachePassage
    from .analysis.display.lens_maps import LensMaps as LensMaps
    from .analysis.display.lens_maps import read_lens_maps as read_lens_maps
    from .analysis.evaluation.probe_evaluation import evaluate as evaluate
    from .analysis.evaluation.result import Evaluation as Evaluation
    from .analysis.report.html_report import write_report as write_report
    from .analysis.service_client.remote_service import RemoteService as RemoteService
    from .analysis.service_client.remote_service import connect as connect
    from .analysis.studies.all_studies import AllStudies as AllStudies
    from .analysis.studies.all_studies import run_all_studies as run_all_studies
    from .analysis.studies.results.study_result import StudyResult as StudyResult
    from .analysis.studies.study_registry import study as study
    from .cache.errors import ResiduaError as ResiduaError
    from .cache.extraction.api import extract as extract
    from .cache.extraction.damage_repair import repair as repair
    from .cache.extraction.model_reload import load_model_of as load_model_of
    from .cache.head.head import Head as Head
    from .cache.head.saved_head import load_head as load_head
    from .cache.resuming.model_resuming import load_model as load_model
    from .cache.resuming.resumable_model import ResumableModel as ResumableModel
    from .cache.sharing.flat_export import export as export
    from .cache.sharing.hub import pull_cache as pull_cache
    from .cache.sharing.hub import push_cache as push_cache
    from .cache.store.activation_cache import ActivationCache as ActivationCache
    from .cache.store.catalog import find_cache as find_cache
    from .cache.store.catalog import open as open
    from .cache.store.row_loader import RowLoader as RowLoader
    from .cache.store.verification import verify as verify
    from .probes.baselines.marginal_bigram import BigramChain as BigramChain
    from .probes.baselines.marginal_bigram import MarginalBigram as MarginalBigram
    from .probes.baselines.ngrams import Bigram as Bigram
    from .probes.baselines.ngrams import LaggedBigram as LaggedBigram
    from .probes.baselines.ngrams import Trigram as Trigram
    from .probes.baselines.ngrams import Unigram as Unigram
    from .probes.basis.causal_basis import CausalBasis as CausalBasis
    from .probes.basis.layer_basis import LayerBasis as LayerBasis
    from .probes.controls.control_probe import ControlProbe as ControlProbe
    from .probes.jacobian.jacobian_fit import fit_jacobian_lens as fit_jacobian_lens
    from .probes.lens.jacobian_lens import JacobianLens as JacobianLens
    from .probes.lens.jacobian_lens_files import read_jacobian_lens as read_jacobian_lens
    from .probes.lens.jacobian_lens_files import write_jacobian_lens as write_jacobian_lens
    from .probes.lens.logit_lens import LogitLens as LogitLens
    from .probes.lens.tuned_lens import FutureLens as FutureLens
    from .probes.lens.tuned_lens import TunedLens as TunedLens
    from .probes.lens.tuned_lens_files import read_tuned_lens as read_tuned_lens
    from .probes.lens.tuned_lens_files import write_tuned_lens as write_tuned_lens
    from .probes.prompts.learned_prompt import LearnedPrompt as LearnedPrompt
    from .probes.prompts.patched_prompt import PatchedPrompt as PatchedPrompt
    from .probes.prompts.patched_prompt import read_prompt as read_prompt
    from .probes.ridge.ridge_probe import RidgeProbe as RidgeProbe
    from .probes.saved.hub import pull_probe as pull_probe
    from .probes.saved.hub import push_probe as push_probe
    from .probes.saved.save import load_probe as load_probe
    from .probes.saved.save import save_probe as save_probe
    from .probes.vocabulary.mlp_probe import MlpProbe as MlpProbe
    from .probes.vocabulary.vocab_probe import VocabProbe as VocabProbe

    __all__: list[str]

__version__ = "0.1.0"

name_extras()
if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__, outside_all=("open",))
