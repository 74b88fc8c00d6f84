"""A carried lens has gap 0 on an identical model; matrices, gaps and gains are those of numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from residua.analysis.studies.comparison.lens_transfer import BITS, study_transfer
from residua.cache.errors import MismatchError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.parted_models import BLOCKS, VOCAB, WIDTH, parted_pair
from ....support.synthetic import make_cache, random_head


def kl_in_memory(cache: ActivationCache, ridge: RidgeProbe | None, layer: int) -> np.ndarray:
    """KL(model || lens) at every position, float64."""
    states = cache.residual_array(layer)[:].astype(np.float64)
    if ridge is not None:
        affine = ridge.map(layer, 0).astype(np.float64)
        states = states @ affine.weight + affine.bias
    q = softmax(cache.head.logits(states.astype(np.float32)).astype(np.float64), -1)
    p = softmax(cache.logits().compute().astype(np.float64), -1)
    return rel_entr(p, q).sum(-1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationCache, ActivationCache]:
    return parted_pair(tmp_path_factory.mktemp("pair"), 2)


def test_a_lens_of_an_identical_model_has_gap_0(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, BLOCKS + 1)
    own = [RidgeProbe(offsets=[0]).fit(cache) for cache in (first, other)]
    result = study_transfer(first, {"a": own[0], "b": own[1]}, to=[other], split="all")
    gaps = [row for row in result.table("layers").rows if row.gap is not None]
    assert len(gaps) == 2 * BLOCKS
    assert all(row.gap == 0 and row.gap_interval == (0, 0) for row in gaps)
    assert {row.origin for row in gaps} == {"other model"}
    assert sum("no clear gap" in text for text in result.says) == 2


def test_gaps_and_gains_are_those_of_the_distributions_in_memory(
    pair: tuple[ActivationCache, ActivationCache],
) -> None:
    first, other = pair
    own = RidgeProbe(offsets=[0]).fit(first), RidgeProbe(offsets=[0]).fit(other)
    result = study_transfer(first, list(own), to=[other], split="all")
    rows = {(row.cache, row.lens, row.layer): row for row in result.table("layers").rows}
    for layer in (1, 3):
        carried, native = (kl_in_memory(other, ridge, layer) for ridge in own)
        logit = kl_in_memory(other, None, layer)
        row = rows["two", "ridge", layer]
        assert row.kl == pytest.approx(carried.mean(), rel=1e-4)
        assert row.gap == pytest.approx((carried - native).mean(), rel=1e-3, abs=1e-6)
        assert row.gain == pytest.approx((logit - carried).mean(), rel=1e-3, abs=1e-6)
        assert row.gap_bits_per_token == pytest.approx(row.gap * BITS)
        assert row.gap_bits_per_byte is None  # without a tokenizer
        assert rows["two", "ridge 2", layer].gap is None  # the native lens itself
        assert rows["two", "logit", layer].origin == "none"
    summary = {(row.cache, row.lens): row for row in result.table("lenses").rows}
    kl = np.stack([kl_in_memory(first, own[1], layer) for layer in range(BLOCKS)]).mean(0)
    assert summary["one", "ridge 2"].kl == pytest.approx(kl.mean(), rel=1e-4)
    assert summary["one", "ridge 2"].origin == "other model"
    assert 0 < summary["one", "ridge 2"].kept <= 1.01
    matrix = result.figure("matrix").rows[0][0]
    assert matrix.y_names == ["logit", "ridge", "ridge 2"]  # pyright: ignore
    assert matrix.values[2][0] == summary["one", "ridge 2"].kl  # pyright: ignore


def test_a_lens_of_other_texts_of_the_same_model_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    caches = []
    for name in ("a", "b"):
        states = [rng.normal(size=(200, WIDTH)).astype(np.float32) for _ in range(3)]
        head = random_head(WIDTH, VOCAB)
        caches.append(make_cache(tmp_path / name, states, [10] * 20, head, seed=len(caches)))
    ridge = RidgeProbe(offsets=[0]).fit(caches[0])
    result = study_transfer(caches[0], [ridge], to=[caches[1]], split="all")
    origins = {(row.cache, row.origin) for row in result.table("lenses").rows}
    names = [f"random {cache.id[:12]}" for cache in caches]
    assert origins >= {(names[0], "native"), (names[1], "other texts")}
    assert any(f"fit ridge {caches[1].id[:12]}" in note for note in result.notes)


def test_undefined_logits_are_left_out(tmp_path: Path) -> None:
    first, _ = parted_pair(tmp_path, BLOCKS + 1)
    layers = [first.residual_array(layer)[:].copy() for layer in first.layers]
    head = random_head(WIDTH, VOCAB)
    head.unembedding[3] = np.nan
    broken = make_cache(
        tmp_path / "broken", layers, [24] * 30, head, ids=first.tokens[:], model="broken"
    )
    ridge = RidgeProbe(offsets=[0]).fit(first)
    result = study_transfer(first, [ridge], to=[broken], split="all")
    of_broken = [row for row in result.table("layers").rows if row.cache == "broken"]
    assert of_broken
    assert all(row.kl is None and row.n == 0 for row in of_broken)
    assert any("no distribution" in note for note in result.notes)


def test_models_of_other_shapes_are_refused(
    pair: tuple[ActivationCache, ActivationCache], tmp_path: Path
) -> None:
    first, other = pair
    ridge = RidgeProbe(offsets=[0]).fit(first)
    for width, blocks, vocab in ((WIDTH + 1, BLOCKS, VOCAB), (WIDTH, 2, VOCAB), (WIDTH, BLOCKS, 7)):
        states = [np.ones((20, width), np.float32)] * (blocks + 1)
        head = random_head(width, vocab)
        stranger = make_cache(tmp_path / f"{width}-{blocks}-{vocab}", states, [10, 10], head)
        with pytest.raises(MismatchError, match=f"width {width}, {blocks} blocks, {vocab} tokens"):
            study_transfer(first, [ridge], to=[stranger], split="all")
    with pytest.raises(UsageError, match="another cache to read it on"):
        study_transfer(first, [ridge], split="all")
    with pytest.raises(UsageError, match="another cache to read it on"):
        study_transfer(first, [], to=[other], split="all")
    with pytest.raises(UsageError, match="given twice"):
        study_transfer(first, [ridge], to=[first], split="all")


def test_a_saved_lens_of_a_fine_tuned_model_reads_the_other(
    pair: tuple[ActivationCache, ActivationCache],
) -> None:
    """Of the model with another head, which `evaluate` refuses without `force`."""
    first, _ = pair
    assert torch.get_num_threads() >= 1
    root = first.path.parent.parent
    layers = [first.residual_array(layer)[:] for layer in first.layers]
    head = random_head(WIDTH, VOCAB, seed=9)
    tuned = make_cache(
        root / "tuned", layers, [24] * 30, head, ids=np.asarray(first.tokens[:]), model="tuned"
    )
    ridge = RidgeProbe(offsets=[0]).fit(first)
    result = study_transfer(first, [ridge], to=[tuned], split="all")
    row = next(r for r in result.table("layers").rows if r.cache == "tuned" and r.lens == "ridge")
    assert row.kl == pytest.approx(kl_in_memory(tuned, ridge, 0).mean(), rel=1e-4)
