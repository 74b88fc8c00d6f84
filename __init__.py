"""Run a frozen language model once, keep its residual streams, fit every probe from the cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.evaluate import Evaluation as Evaluation
    from .analysis.evaluate import evaluate as evaluate
    from .cache.catalog import find_cache as find_cache
    from .cache.errors import ResiduaError as ResiduaError
    from .cache.export import export as export
    from .cache.extract import extract as extract
    from .cache.head import Head as Head
    from .cache.loader import RowLoader as RowLoader
    from .cache.repair import repair as repair
    from .cache.share import pull as pull
    from .cache.share import push as push
    from .cache.store import ActivationCache as ActivationCache
    from .cache.verify import verify as verify
    from .probes.bigram import Bigram as Bigram
    from .probes.bigram import LaggedBigram as LaggedBigram
    from .probes.chain import BigramChain as BigramChain
    from .probes.chain import MarginalBigram as MarginalBigram
    from .probes.control import ControlProbe as ControlProbe
    from .probes.lens import FutureLens as FutureLens
    from .probes.lens import TunedLens as TunedLens
    from .probes.readout import LogitLens as LogitLens
    from .probes.ridge import RidgeProbe as RidgeProbe
    from .probes.save import load_probe as load_probe
    from .probes.save import save_probe as save_probe
    from .probes.share import load_from_hub as load_from_hub
    from .probes.share import push_to_hub as push_to_hub
    from .probes.trigram import Trigram as Trigram
    from .probes.tunedlens import read_tuned_lens as read_tuned_lens
    from .probes.tunedlens import write_tuned_lens as write_tuned_lens
    from .probes.unigram import Unigram as Unigram
    from .probes.vocab import VocabProbe as VocabProbe

__version__ = "0.1.0"

# Public name -> module; imported on first use, so that `import residua` stays light.
_PUBLIC = {
    "ActivationCache": ".cache.store",
    "Bigram": ".probes.bigram",
    "BigramChain": ".probes.chain",
    "ControlProbe": ".probes.control",
    "Evaluation": ".analysis.evaluate",
    "FutureLens": ".probes.lens",
    "Head": ".cache.head",
    "LaggedBigram": ".probes.bigram",
    "LogitLens": ".probes.readout",
    "MarginalBigram": ".probes.chain",
    "ResiduaError": ".cache.errors",
    "RidgeProbe": ".probes.ridge",
    "RowLoader": ".cache.loader",
    "Trigram": ".probes.trigram",
    "Unigram": ".probes.unigram",
    "TunedLens": ".probes.lens",
    "VocabProbe": ".probes.vocab",
    "evaluate": ".analysis.evaluate",
    "export": ".cache.export",
    "extract": ".cache.extract",
    "find_cache": ".cache.catalog",
    "load_from_hub": ".probes.share",
    "load_probe": ".probes.save",
    "pull": ".cache.share",
    "push": ".cache.share",
    "push_to_hub": ".probes.share",
    "read_tuned_lens": ".probes.tunedlens",
    "repair": ".cache.repair",
    "save_probe": ".probes.save",
    "verify": ".cache.verify",
    "write_tuned_lens": ".probes.tunedlens",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'residua' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
