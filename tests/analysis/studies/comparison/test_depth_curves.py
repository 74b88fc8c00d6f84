"""Curves over relative depth: the yardstick is exact, and a planted input echo is found."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import entr, rel_entr, softmax

import residua
from residua.analysis.studies.comparison.model_comparison import study_compare
from residua.cache.errors import MismatchError
from residua.cache.head.head import Head
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.models import save_model, texts
from ....support.parted_models import parted_pair
from ....support.synthetic import make_cache

VOCAB = 16
FAMILIES = ("gpt2", "gpt_neox", "llama", "bloom", "opt", "gpt_neo")


def echo_cache(root: Path, share: float) -> residua.ActivationCache:
    """A model whose layer 1 gives the input token back at `share` of positions."""
    rng = np.random.default_rng(0)
    n = 400
    ids = rng.integers(0, VOCAB, n)
    other = (ids + 1) % VOCAB
    shown = np.where(np.arange(n) < share * n, ids, other)
    states = [10 * np.eye(VOCAB, dtype=np.float32)[tokens] for tokens in (other, shown, other)]
    head = Head(
        norm="none",
        eps=0.0,
        norm_weight=np.ones(VOCAB, np.float32),
        norm_bias=np.zeros(VOCAB, np.float32),
        unembedding=np.eye(VOCAB, dtype=np.float32),
        bias=np.zeros(VOCAB, np.float32),
    )
    return make_cache(root, states, [20] * 20, head, ids=ids, model=f"echo-{share}")


def test_a_planted_echo_is_found_at_its_layer(tmp_path: Path) -> None:
    caches = [echo_cache(tmp_path / "a", 0.75), echo_cache(tmp_path / "b", 0.0)]
    result = study_compare(caches, by="depth", split="all")
    rows = {(row.model, row.layer): row for row in result.table("curves").rows}
    assert rows["echo-0.75", 1].echo == pytest.approx(0.75)
    assert rows["echo-0.75", 1].agreement == pytest.approx(0.25)
    assert rows["echo-0.75", 1].depth == 0.5
    assert [rows["echo-0.75", layer].echo for layer in (0, 2)] == [0, 0]
    assert all(rows["echo-0.0", layer].echo == 0 for layer in (0, 1, 2))
    planted, none = result.table("models").rows
    assert (planted.largest_echo, planted.echo_depth) == (pytest.approx(0.75), 0.5)
    assert planted.failing_layers == 1  # right at a quarter, sure of another token elsewhere
    assert planted.fails_until == 0.5
    assert none.fails_until is None


def test_the_yardstick_is_the_mean_distribution(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    result = study_compare([first, other], by="depth", split="all")
    for cache, row in zip((first, other), result.table("models").rows, strict=True):
        p = softmax(cache.logits().compute().astype(np.float64), -1)
        constant = rel_entr(p, p.mean(0)).sum(-1).mean()
        assert row.constant_kl == pytest.approx(constant, rel=1e-4)
        assert row.entropy == pytest.approx(entr(p).sum(-1).mean(), rel=1e-5)
        assert row.n == cache.positions
        logits = cache.logits(1).compute().astype(np.float64)
        kl = rel_entr(p, softmax(logits, -1)).sum(-1).mean()
        curve = next(r for r in result.table("curves").rows if (r.model, r.layer) == (row.model, 1))
        assert curve.kl == pytest.approx(kl, rel=1e-4)
        assert curve.kl_of_constant == pytest.approx(kl / constant, rel=1e-3)


def test_a_lens_is_read_on_its_own_model_alone(tmp_path: Path) -> None:
    first, _ = parted_pair(tmp_path / "a", 2)
    stranger, third = parted_pair(tmp_path / "b", 2, seed=3)
    ridge = RidgeProbe(offsets=[0]).fit(first)
    result = study_compare([first, third], [ridge], by="depth", split="all")
    assert {(r.model, r.lens) for r in result.table("models").rows} == {
        ("one", "logit"),
        ("one", "ridge"),
        ("two", "logit"),
    }
    with pytest.raises(MismatchError, match="none of the models"):
        study_compare([stranger, third], [ridge], by="depth", split="all")


@pytest.mark.slow
def test_six_families_of_models_are_compared_by_depth(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40)))
    caches = [
        residua.extract(
            str(save_model(tmp_path / kind, kind)), str(path), root=tmp_path / "root", context=32
        )
        for kind in FAMILIES
    ]
    result = study_compare(caches, split="all", max_positions=512)
    models = result.table("models").rows
    assert [row.model for row in models] == list(FAMILIES)
    for cache, row in zip(caches, models, strict=True):
        curve = [r for r in result.table("curves").rows if r.model == row.model]
        assert [r.layer for r in curve] == list(cache.layers)
        assert curve[-1].kl == pytest.approx(0, abs=1e-5)
        assert curve[-1].agreement == 1
        assert all(r.n == row.n and r.n_undefined == 0 for r in curve)
        positions = result.subject.n // len(FAMILIES)
        assert abs(row.n - positions) <= 64
    assert len(result.says) == len(FAMILIES)
