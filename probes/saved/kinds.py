"""Kinds of probes: the name in a saved probe, and the class of that name."""

from importlib import import_module
from typing import Any

KINDS = {
    "basis": ("..basis.causal_basis", "CausalBasis"),
    "bigram": ("..baselines.ngrams", "Bigram"),
    "chain": ("..baselines.marginal_bigram", "BigramChain"),
    "future": ("..lens.tuned_lens", "FutureLens"),
    "jacobian": ("..lens.jacobian_lens", "JacobianLens"),
    "lagged": ("..baselines.ngrams", "LaggedBigram"),
    "lens": ("..lens.tuned_lens", "TunedLens"),
    "marginal": ("..baselines.marginal_bigram", "MarginalBigram"),
    "mlp": ("..vocabulary.mlp_probe", "MlpProbe"),
    "prompt": ("..prompts.learned_prompt", "LearnedPrompt"),
    "ridge": ("..ridge.ridge_probe", "RidgeProbe"),
    "trigram": ("..baselines.ngrams", "Trigram"),
    "unigram": ("..baselines.ngrams", "Unigram"),
    "vocab": ("..vocabulary.vocab_probe", "VocabProbe"),
}
"""Kind -> module and class; a module is imported when a probe of its kind is needed."""


def is_known(kind: Any) -> bool:
    """Whether `kind` is a key of `KINDS`, alone or with a control behind it: `ridge/shuffled`."""
    return isinstance(kind, str) and kind.partition("/")[0] in KINDS


def probe_class(kind: str) -> Any:
    """The class of a known kind; `ControlProbe` for a kind with a control."""
    module, name = ("..controls.control_probe", "ControlProbe") if "/" in kind else KINDS[kind]
    return getattr(import_module(module, __package__), name)
