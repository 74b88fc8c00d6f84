"""Probes: everything that is fitted from a cache, out of core, without the model."""

from typing import TYPE_CHECKING

from ..cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .baselines.marginal_bigram import BigramChain as BigramChain
    from .baselines.marginal_bigram import MarginalBigram as MarginalBigram
    from .baselines.ngrams import Bigram as Bigram
    from .baselines.ngrams import LaggedBigram as LaggedBigram
    from .baselines.ngrams import Trigram as Trigram
    from .baselines.ngrams import Unigram as Unigram
    from .controls.control_probe import ControlProbe as ControlProbe
    from .lens.jacobian_lens import JacobianLens as JacobianLens
    from .lens.logit_lens import LogitLens as LogitLens
    from .lens.tuned_lens import FutureLens as FutureLens
    from .lens.tuned_lens import TunedLens as TunedLens
    from .ridge.ridge_probe import RidgeProbe as RidgeProbe
    from .saved.save import load_probe as load_probe
    from .saved.save import save_probe as save_probe
    from .vocabulary.mlp_probe import MlpProbe as MlpProbe
    from .vocabulary.vocab_probe import VocabProbe as VocabProbe
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
