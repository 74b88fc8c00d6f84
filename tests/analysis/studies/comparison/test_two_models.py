"""Two models on the same tokens part where they were made to; divergences are those of numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from residua.analysis.studies.comparison.divergence_rows import parting_row
from residua.analysis.studies.comparison.joined_sequences import join_caches, sequence_digests
from residua.analysis.studies.comparison.model_comparison import study_compare
from residua.analysis.studies.comparison.model_divergence import (
    LayerPair,
    compare_logits,
    pair_layers,
)
from residua.analysis.studies.comparison.state_similarity import linear_cka, similarity_matrix
from residua.analysis.studies.comparison.token_groups import CLASSES, band_of_token, token_class
from residua.cache.errors import MismatchError, UsageError
from residua.probes.ridge.ridge_probe import RidgeProbe

from ....support.parted_models import BLOCKS, LENGTHS, VOCAB, WIDTH, parted_pair
from ....support.synthetic import make_cache, random_head


def test_divergences_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    first, other = rng.normal(0, 3, (2, 50, 37)).astype(np.float32)
    first[3, 5:] = -np.inf  # tokens that one side excludes
    other[4] = first[4]
    text = rng.integers(0, 37, 50)
    text[7] = -1
    found = compare_logits(
        torch.from_numpy(first), torch.from_numpy(other), 3, torch.from_numpy(text)
    )
    p, q = softmax(first.astype(np.float64), -1), softmax(other.astype(np.float64), -1)
    middle = (p + q) / 2
    js = (rel_entr(p, middle).sum(-1) + rel_entr(q, middle).sum(-1)) / 2
    np.testing.assert_allclose(found["kl"], rel_entr(p, q).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["reverse"], rel_entr(q, p).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["js"], js, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["differs"], p.argmax(-1) != q.argmax(-1))
    np.testing.assert_array_equal(found["top 0"][:, 0], p.argmax(-1))
    np.testing.assert_allclose(found["p 1"], -np.sort(-q, -1)[:, :3], rtol=1e-4)
    nll = -log_softmax(other.astype(np.float64), -1)[np.arange(50), np.maximum(text, 0)]
    nll[7] = np.nan
    np.testing.assert_allclose(found["nll 1"], nll, rtol=1e-4)
    # Equal rows are equal, to the last bit.
    assert [float(found[name][4]) for name in ("kl", "reverse", "js", "differs")] == [0, 0, 0, 0]


def test_rows_that_are_no_distribution_are_undefined() -> None:
    logits = torch.zeros(4, 9)
    bad = logits.clone()
    bad[0, 2], bad[1, 2], bad[2] = float("nan"), float("inf"), float("-inf")
    for pair in ((logits, bad), (bad, logits)):
        found = compare_logits(*pair)
        for name in ("kl", "reverse", "js", "differs"):
            assert torch.isnan(found[name]).tolist() == [True, True, True, False]


def test_linear_cka_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for n, width, other in ((200, 7, 5), (6, 40, 30)):
        x, y = rng.normal(2, 1, (n, width)), rng.normal(size=(n, other))
        y[:, 0] += x[:, 0]
        gram_x, gram_y = ((r - r.mean(0)) @ (r - r.mean(0)).T for r in (x, y))
        expected = (gram_x * gram_y).sum() / np.linalg.norm(gram_x) / np.linalg.norm(gram_y)
        assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
        turned = np.linalg.qr(rng.normal(size=(width, width)))[0]
        assert linear_cka(x, 3 * x @ turned + 1) == pytest.approx(1, abs=1e-9)
    assert np.isnan(linear_cka(x, np.ones((6, 2))))


@pytest.mark.parametrize("layer", [1, 3])
def test_models_part_at_the_layer_where_one_got_noise(tmp_path: Path, layer: int) -> None:
    first, other = parted_pair(tmp_path, layer)
    result = study_compare([first, other], split="all")
    rows = {row.first_layer: row for row in result.table("depths").rows if row.lens == "logit"}
    assert sorted(rows) == list(range(BLOCKS + 1))
    for number, row in rows.items():
        assert row.other_layer == number
        assert (row.js == 0) == (number < layer)
        assert row.equal_states == (1 if number < layer else 0)
    (parting,) = result.table("parting").rows
    assert parting.layer == layer
    assert parting.depth == layer / BLOCKS
    assert parting.depth_interval == (layer / BLOCKS, layer / BLOCKS)
    assert any(f"equal bit for bit up to layer {layer - 1}." in text for text in result.says)
    cka = {(row.first_layer, row.other_layer): row.cka for row in result.table("similarity").rows}
    for number in range(BLOCKS + 1):
        assert (cka[number, number] == pytest.approx(1, abs=1e-9)) == (number < layer)
    everything = result.table("groups").rows[0]
    assert everything.n == sum(LENGTHS)
    assert everything.js > 0.01
    json = result.to_dict()
    assert json["subject"]["caches"] == [first.id, other.id]
    assert {figure["name"] for figure in json["figures"]} == {"divergence", "similarity"}


def test_equal_models_do_not_part(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, BLOCKS + 1)
    result = study_compare([first, other], split="all")
    everything = result.table("groups").rows[0]
    assert (everything.js, everything.kl, everything.reverse) == (0, 0, 0)
    assert everything.js_interval == (0, 0)
    assert result.table("parting").rows[0].layer is None
    assert any("no layer at which they part" in text for text in result.says)
    assert any("No clear difference" in text for text in result.says)
    assert result.table("passages").rows == []


def test_other_precisions_of_the_models_are_said(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    assert not any(
        "computed in" in note for note in study_compare([first, other], split="all").notes
    )
    capture = replace(other.manifest.capture, compute_dtype="float16")
    other.manifest = replace(other.manifest, capture=capture)
    notes = study_compare([first, other], split="all").notes
    assert any("computed in float32 and float16" in note for note in notes)


def test_means_are_those_of_the_distributions_in_memory(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    result = study_compare([first, other], split="all")
    p, q = (softmax(cache.logits().compute().astype(np.float64), -1) for cache in (first, other))
    middle = (p + q) / 2
    js = (rel_entr(p, middle).sum(-1) + rel_entr(q, middle).sum(-1)) / 2
    everything = result.table("groups").rows[0]
    assert everything.js == pytest.approx(js.mean(), rel=1e-5)
    assert everything.kl == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-5)
    assert everything.disagreement == pytest.approx((p.argmax(-1) != q.argmax(-1)).mean())
    ids = np.asarray(first.tokens[:])
    text = first.following_tokens(np.arange(first.positions))
    known = text >= 0
    nll = [-np.log(r[np.arange(len(r)), text])[known] for r in (p, q)]
    assert everything.cross_entropy == pytest.approx(nll[0].mean(), rel=1e-5)
    assert everything.cross_entropy_difference == pytest.approx((nll[1] - nll[0]).mean(), rel=1e-4)
    # The bands of frequency hold all positions that have a next token.
    bands = [row for row in result.table("groups").rows if row.kind == "frequency"]
    assert sum(row.n for row in bands) == known.sum()
    token = max(result.table("tokens").rows, key=lambda row: row.js)
    number = int(token.token.lstrip("#"))
    assert token.js == pytest.approx(js[known][text[known] == number].mean(), rel=1e-4)
    assert token.n == (text[known] == number).sum()
    passage = result.table("passages").rows[0]
    start = first.sequence_start[passage.sequence] + passage.index
    assert passage.js == pytest.approx(js[start : start + 16].mean(), rel=1e-4)
    assert passage.passage.split()[0] == f"#{ids[start]}"


def test_the_parting_of_each_position_is_its_own(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    sample = join_caches(first, other, "all")
    js = np.zeros((sample.first.count, 3), np.float32)
    js[:, 2] = 0.4
    js[::2, 1] = 0.3
    pairs = (LayerPair(0, 0, 0.0), LayerPair(2, 2, 0.5), LayerPair(4, 4, 1.0))
    row = parting_row(sample, "logit", pairs, js)
    assert row.layer == 4  # the mean at layer 2, 0.15, is less than half of 0.4
    assert row.by_position == pytest.approx(0.75)
    js[1, 0] = np.nan  # undefined: left out
    assert parting_row(sample, "logit", pairs, js).n == sample.first.count - 1
    assert parting_row(sample, "logit", pairs, np.full_like(js, np.nan)).layer is None


def test_only_equal_sequences_are_joined_whatever_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    head = random_head(WIDTH, VOCAB)
    sequences = [rng.integers(0, VOCAB, 10) for _ in range(8)]
    sequences[5] = sequences[1]  # a sequence that comes twice
    states = [rng.normal(size=(80, WIDTH)).astype(np.float32) for _ in range(2)]
    first = make_cache(tmp_path / "a", states, [10] * 8, head, ids=np.concatenate(sequences))
    order = [5, 3, 1, 0]
    others = [sequences[n] for n in order] + [rng.integers(0, VOCAB, 10)]
    rows = np.concatenate([np.arange(10 * n, 10 * n + 10) for n in order])
    changed = [np.concatenate([layer[rows], layer[:10]]) for layer in states]
    other = make_cache(
        tmp_path / "b", changed, [10] * 5, head, ids=np.concatenate(others), model="b"
    )
    sample = join_caches(first, other, "all")
    assert sample.shares == (0.5, 0.8)
    assert sample.first.sequences.tolist() == [0, 1, 3, 5]
    np.testing.assert_array_equal(
        first.tokens.take(sample.first.positions), other.tokens.take(sample.other_positions)
    )
    assert len(set(sample.other_positions.tolist())) == 40
    result = study_compare([first, other], split="all")
    assert any("50.0%" in note and "80.0%" in note for note in result.notes)
    assert len(set(sequence_digests(first, np.arange(8)))) == 8


def test_other_tokens_and_other_lenses_are_refused_with_a_way_out(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    strangers, _ = parted_pair(tmp_path / "strangers", 2, seed=5)
    with pytest.raises(UsageError, match="share no sequence .*residua extract .*--by depth"):
        study_compare([first, strangers], split="all")
    small = make_cache(
        tmp_path / "small",
        [np.zeros((20, WIDTH), np.float32)] * 2,
        [10, 10],
        random_head(WIDTH, VOCAB - 1),
    )
    with pytest.raises(UsageError, match="have 40 and 39 logits"):
        study_compare([first, small], split="all")
    for caches, by, reason in (
        ([first], None, "1 cache given"),
        ([first, other, strangers], "tokens", "3 caches given"),
        ([first, first], None, "given twice"),
        ([first, other], "layer", "not by 'layer'"),
    ):
        with pytest.raises(UsageError, match=reason):
            study_compare(caches, by=by, split="all")
    ridge = RidgeProbe(offsets=[0]).fit(strangers)
    with pytest.raises(MismatchError, match="ridge is a lens of neither model"):
        study_compare([first, other], [ridge], split="all")


def test_each_model_is_read_with_its_own_lens(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 3)
    own = [RidgeProbe(offsets=[0]).fit(cache) for cache in (first, other)]
    result = study_compare([first, other], own, split="all")
    assert {row.lens for row in result.table("depths").rows} == {"logit", "ridge"}
    # Another lens reads the states otherwise, though they are equal.
    ridge = [row for row in result.table("depths").rows if row.lens == "ridge"]
    assert ridge[1].equal_states == 1
    assert ridge[1].js > 0
    alone = study_compare([first, other], own[:1], split="all")
    assert {row.lens for row in alone.table("depths").rows} == {"logit"}
    assert any("ridge lens is left out" in note for note in alone.notes)


def test_layers_are_paired_by_relative_depth(tmp_path: Path) -> None:
    first, _ = parted_pair(tmp_path, 2)
    states = [np.zeros((20, 3), np.float32)] * 9
    deep = make_cache(tmp_path / "deep", states, [10, 10], random_head(3, VOCAB))
    pairs = pair_layers(first, deep, (first.layers, deep.layers))
    assert pairs == tuple(LayerPair(n, 2 * n, n / 4) for n in range(5))
    assert pair_layers(first, deep, ((4,), (8,))) == (LayerPair(4, 8, 1.0),)


def test_similarity_reads_evenly_spread_positions_and_skips_broken_rows(tmp_path: Path) -> None:
    first, other = parted_pair(tmp_path, 2)
    sample = join_caches(first, other, "all")
    matrix, n = similarity_matrix(sample, ((1,), (1, 3)), max_rows=100)
    assert n == 100
    chosen = np.unique(np.linspace(0, sample.first.count - 1, 100).astype(int))
    x, y = first.residual_array(1)[:][chosen], other.residual_array(3)[:][chosen]
    assert matrix[0] == pytest.approx([1, linear_cka(x, y)])


def test_tokens_are_grouped_by_their_text_and_frequency(tmp_path: Path) -> None:
    examples = {
        " the": "begins a word",
        "ing": "inside a word",
        "n't": "inside a word",
        " 1,000": "number",
        "7": "number",
        "...": "punctuation",
        " ->": "punctuation",
        "\n\n": "space",
        " ": "space",
        "": "other",
        "a1": "other",
    }
    for text, name in examples.items():
        assert CLASSES[token_class(text)] == name, text
    ids = np.concatenate([np.full(30, 7), np.full(20, 3), np.arange(10, 30)])
    states = [np.zeros((70, 3), np.float32)] * 2
    cache = make_cache(tmp_path, states, [7] * 10, random_head(3, VOCAB), ids=ids)
    bands = band_of_token(cache, "all")
    assert (bands[7], bands[3], bands[10], bands[17], bands[18], bands[0]) == (0, 0, 0, 0, 1, 4)
