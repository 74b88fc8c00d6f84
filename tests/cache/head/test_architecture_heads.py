"""Which architectures have a head by formula, and that its norm and eps are the model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.checks.model_checks import ModelReport, check_model
from residua.cache.head.head_identification import SMALL_STD, scale_to_std
from residua.cache.head.saved_head import load_head

from ...support.architectures import KINDS, VOCAB, build_architecture
from ...support.conformance import TOLERANCE, random_stream

EPS = 3e-4
"""Of every norm of `architectures.build`, far from all defaults."""
RMSNORM_KINDS = (
    "llama gemma gemma2 granite minicpm3 falcon_h1 nanochat mixtral deepseek_v3 mamba jamba "
    "recurrent_gemma hrm_text mllama cpmant blt"
).split()
LAYERNORM_KINDS = "gpt2 gpt_neox bloom mpt phi gptj cohere".split()
FIXED_EPS = {"opt": 1e-5, "rwkv": 1e-5}
"""Layer norms at the end whose eps no field of the configuration says: torch's default."""
KINDS_WITHOUT_NORM = "bart openai-gpt xlnet xlm".split()
PROGRAM_KINDS = (
    "bert roberta modernbert-decoder deepseek_v4 hy_v4 gemma3n_text prophetnet reformer"
).split()
"""Heads that no formula of ours gives: kept as operations."""
EXPLICIT = {
    **dict.fromkeys(RMSNORM_KINDS, ("rmsnorm", EPS)),
    **dict.fromkeys(LAYERNORM_KINDS, ("layernorm", EPS)),
    **{kind: ("layernorm", eps) for kind, eps in FIXED_EPS.items()},
    **dict.fromkeys(KINDS_WITHOUT_NORM, ("none", 0.0)),
}
"""Kind -> norm and eps of its explicit head."""


def report_of(model: torch.nn.Module) -> ModelReport:
    return check_model(model, random_stream(), "float32", "auto")


def assert_small_rows_match(report: ModelReport, head: Any) -> None:
    """Residual streams so small that eps is most of what the norm divides by."""
    ids = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB - 1, (2, 29)))
    for size in (SMALL_STD, 10 * SMALL_STD):
        with torch.inference_mode():
            hidden = scale_to_std(report.stack.residuals(ids)[-1], size)
            expected = report.stack.run_tail(hidden, ids).numpy()
        rows = hidden.numpy()
        for logits in (head.logits(rows), head.torch()(torch.from_numpy(rows)).numpy()):
            assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kind", [kind for kind in EXPLICIT if kind in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_the_head_is_the_formula_with_the_models_eps(kind: str, tmp_path: Path) -> None:
    report = report_of(build_architecture(kind))
    head = report.head
    assert head.kind == "explicit"
    assert (head.norm, head.eps) == (EXPLICIT[kind][0], pytest.approx(EXPLICIT[kind][1], rel=1e-6))
    head.save(tmp_path, report.tensors)
    loaded = load_head(tmp_path)
    assert loaded.eps == head.eps
    assert_small_rows_match(report, loaded)


@pytest.mark.parametrize("kind", [kind for kind in PROGRAM_KINDS if kind in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_other_heads_are_programs_that_hold_for_small_rows(kind: str) -> None:
    report = report_of(build_architecture(kind))
    assert report.head.kind == "program"
    assert_small_rows_match(report, report.head)


@pytest.mark.parametrize("eps", [1e-3, 2.5e-5, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize(
    ("kind", "field"), [("llama", "rms_norm_eps"), ("gpt_neox", "layer_norm_eps")]
)
def test_any_eps_of_a_configuration_is_the_heads(kind: str, field: str, eps: float) -> None:
    fields: dict[str, Any] = {field: eps}
    model: Any = build_architecture(kind, **fields)
    assert getattr(model.config, field) == eps
    report = report_of(model)
    assert report.head.kind == "explicit"
    assert report.head.eps == eps
    assert_small_rows_match(report, report.head)
