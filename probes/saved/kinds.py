"""Kinds of probes by the name that a saved probe carries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


KINDS = {
    "bigram": ("..baselines.ngrams", "Bigram"),
    "chain": ("..baselines.marginal_bigram", "BigramChain"),
    "future": ("..lens.tuned_lens", "FutureLens"),
    "lagged": ("..baselines.ngrams", "LaggedBigram"),
    "lens": ("..lens.tuned_lens", "TunedLens"),
    "marginal": ("..baselines.marginal_bigram", "MarginalBigram"),
    "ridge": ("..ridge.ridge_probe", "RidgeProbe"),
    "trigram": ("..baselines.ngrams", "Trigram"),
    "unigram": ("..baselines.ngrams", "Unigram"),
    "vocab": ("..vocabulary.vocab_probe", "VocabProbe"),
}
"""Module and class of each kind of probe; imported when one is loaded."""


def is_known(kind: Any) -> bool:
    """Whether `kind` is one of `KINDS`, or one of them with a control: `ridge/shuffled`."""
    return isinstance(kind, str) and kind.partition("/")[0] in KINDS


def probe_class(kind: str) -> Any:
    """The class of a known kind of probe."""
    module, name = ("..controls.control_probe", "ControlProbe") if "/" in kind else KINDS[kind]
    return getattr(import_module(module, __package__), name)
