"""Claims about evaluation: streamed equals whole, no pair crosses a sequence, the end is exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.analysis.evaluation.lens_heatmap import heatmap
from residua.analysis.evaluation.metrics import KS, EvaluationRow
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.evaluation.result import Evaluation
from residua.analysis.evaluation.windows import (
    EvaluationSample,
    choose_sequences,
    evaluation_windows,
)
from residua.analysis.report.tables import offset_tables
from residua.analysis.token_texts.token_names import UNDEFINED, TokenNames, visible
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.splits import SPLITS
from residua.probes.base.readout import ReadoutBatch
from residua.probes.baselines.ngrams import Bigram

from ...support.synthetic import make_cache, random_head

VOCAB, D_MODEL, LAYERS = 29, 8, 3


def make_random_cache(root: Path, lengths: list[int], seed: int = 0) -> ActivationCache:
    rng = np.random.default_rng(seed)
    states = [rng.normal(0, 1, (sum(lengths), D_MODEL)) for _ in range(LAYERS)]
    return make_cache(root, states, lengths, random_head(D_MODEL, VOCAB), seed=seed)


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> ActivationCache:
    lengths = np.random.default_rng(2).integers(1, 25, 80).tolist()
    return make_random_cache(tmp_path_factory.mktemp("caches"), lengths)


class NegatedLens:
    """A bad lens (the head on the negated state) that records the sizes of its calls."""

    kind = "echo"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(1, 0), (1, 2)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int):
        assert batch.hidden is not None
        assert len(batch.hidden) == len(batch.last_token)
        self.calls.append((len(batch.hidden), layer or 0, offset))
        return batch.head(-batch.hidden)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measures_in_memory(
    cache: ActivationCache, split: str, layer: int | None, offset: int
) -> dict[str, float]:
    """The measures of the logit lens (bigram without a layer), in memory, one pair at a time."""
    model = cache.head.logits(cache.residual_array(cache.n_blocks)[:])
    probe = None if layer is None else cache.head.logits(cache.residual_array(layer)[:])
    pairs = Bigram().fit(cache).log_probabilities(np.arange(cache.vocab))
    found: dict[str, list[float]] = {}
    for number in cache.sequences(split):
        start, length = int(cache.sequence_start[number]), int(cache.sequence_length[number])
        ids = cache.tokens[start : start + length]
        for t in range(length - offset):
            s = t + offset
            q = pairs[ids[s]] if probe is None else probe[start + t]
            text = int(ids[s + 1]) if s + 1 < length else None
            for name, value in measures_of_pair(model[start + s], q, text).items():
                found.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {**means, "n": len(found["kl"]), "n_text": len(found["nll_text"])}


def measures_of_pair(model: np.ndarray, probe: np.ndarray, text: int | None) -> dict[str, float]:
    log_p, log_q = log_softmax(model), log_softmax(probe)
    order, top = np.argsort(-probe, kind="stable"), int(model.argmax())
    out = {
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum()),
        "nll": -log_q[top],
        "surprisal": -log_p[order[0]],
        **{f"precision_at_{k}": float(top in order[:k]) for k in KS},
    }
    if text is not None:
        out["nll_text"] = -log_q[text]
        out |= {f"precision_at_{k}_text": float(text in order[:k]) for k in KS}
    return out


def row_of(evaluation: Evaluation, probe: str, layer: int | None, offset: int) -> EvaluationRow:
    return next(row for row in evaluation.select(probe, offset) if row.layer == layer)


@pytest.fixture(scope="module")
def streamed(tiny_cache) -> Evaluation:
    bigram = Bigram().fit(tiny_cache)
    return evaluate(tiny_cache, [bigram], split="train", offsets=(0, 1, 3), batch_rows=17)


@pytest.mark.parametrize(
    ("layer", "offset"),
    [(None, 1), (None, 3), *((layer, offset) for layer in (0, 1, 2) for offset in (0, 1, 3))],
)
def test_streamed_equals_whole(tiny_cache, streamed, layer, offset):
    row = row_of(streamed, "bigram" if layer is None else "logit", layer, offset)
    expected = measures_in_memory(tiny_cache, "train", layer, offset)
    assert row.n == expected["n"] > 0
    assert expected["n_text"] > 0
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 5, 64])
def test_results_do_not_depend_on_batch_rows(tiny_cache, rows):
    one = evaluate(tiny_cache, [NegatedLens()], split="train", batch_rows=rows).to_dicts()
    other = evaluate(tiny_cache, [NegatedLens()], split="train").to_dicts()
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for name, value in left.items():
            same = value == right[name] or value == pytest.approx(right[name], rel=1e-5, abs=1e-6)
            assert same, name


def test_the_bigram_has_no_row_where_it_would_read_nothing(streamed):
    """At offset 0 its token is the one that a probe reads too, and `Bigram` begins at 1."""
    assert not streamed.select("bigram", 0)
    assert {row.offset for row in streamed.rows if row.probe == "bigram"} == {1, 3}


def test_the_last_layer_is_the_model_itself(tiny_cache):
    row = row_of(evaluate(tiny_cache), "logit", tiny_cache.n_blocks, 0)
    assert row.kl == pytest.approx(0, abs=1e-6)
    assert row.precision_at_1 == 1
    assert row.nll == pytest.approx(row.surprisal, abs=1e-6)


def test_a_window_reads_no_more_rows_than_its_limit_wherever_targets_lie(tiny_cache):
    """Sources of scattered targets are rows of their own: fewer targets share a window."""
    where, offsets = np.zeros(tiny_cache.positions, bool), (0, 1, 3)
    where[::11] = True
    sequences, targets = tiny_cache.sequences("train"), 0
    sample = EvaluationSample(tiny_cache, sequences, where=where)
    for window in evaluation_windows(sample, offsets, batch_rows=12):
        assert len(window.positions) <= 12
        targets += len(window.target_rows)
    assert targets == where[tiny_cache.positions_of(sequences)].sum() > 12


def test_no_pair_crosses_a_sequence(tiny_cache):
    sequences = tiny_cache.sequences("train")
    lengths = tiny_cache.sequence_length[sequences]
    which = tiny_cache.array("tokens/sequence")[:]
    for offset in (0, 1, 3):
        pairs = []
        sample = EvaluationSample(tiny_cache, sequences)
        for window in evaluation_windows(sample, (offset,), batch_rows=7):
            targets = window.targets(offset)
            sources, rows = window.sources(targets, offset), window.target_rows[targets]
            pairs += zip(window.positions[sources], window.positions[rows], strict=True)
        sources, targets = (np.array(side) for side in zip(*pairs, strict=True))
        assert np.array_equal(which[sources], which[targets])
        assert np.array_equal(targets - sources, np.full(len(pairs), offset))
        assert len(set(targets.tolist())) == len(pairs) == np.maximum(lengths - offset, 0).sum()


def test_a_probe_is_asked_for_whole_sequences_only(tiny_cache):
    probe = NegatedLens()
    found = evaluate(tiny_cache, [probe], split="train")
    for offset in (0, 2):
        rows_read = sum(rows for rows, _, n in probe.calls if n == offset)
        assert rows_read == row_of(found, "echo", 1, offset).n


def test_baselines_cover_what_the_probes_read(tiny_cache):
    found = evaluate(tiny_cache, [NegatedLens(), NegatedLens()])
    assert found.probes == ("bigram", "logit", "echo", "echo 2")
    assert {(r.probe, r.layer, r.offset) for r in found.rows} == {
        ("bigram", None, 2),
        *((name, 1, n) for name in ("logit", "echo", "echo 2") for n in (0, 2)),
    }


def test_without_probes_all_layers_and_four_offsets_are_measured(tiny_cache):
    found = evaluate(tiny_cache)
    pairs = {(r.layer, r.offset) for r in found.rows if r.probe == "logit"}
    assert pairs == {(layer, offset) for layer in range(LAYERS) for offset in range(4)}


def test_sequences_are_drawn_whole_and_seeded(tiny_cache):
    drawn = choose_sequences(tiny_cache, "train", 60, seed=1)
    assert tiny_cache.sequence_length[drawn].sum() <= 60
    assert np.array_equal(drawn, choose_sequences(tiny_cache, "train", 60, seed=1))
    assert not np.array_equal(drawn, choose_sequences(tiny_cache, "train", 60, seed=2))
    assert len(choose_sequences(tiny_cache, "train", 1, seed=0)) == 1


def test_progress_ends_at_the_total(tiny_cache):
    seen: list[tuple[int, int]] = []
    found = evaluate(tiny_cache, batch_rows=9, progress=lambda *done: seen.append(done))
    assert seen[-1] == (found.n, found.n)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_table_has_a_row_per_layer(tiny_cache):
    found = evaluate(tiny_cache, [NegatedLens()], layers=(0, 1), offsets=(0, 2))
    table = offset_tables(found)[1]
    assert table.columns == ("layer", "logit KL", "logit p@1", "echo KL", "echo p@1")
    assert [row[0] for row in table.rows] == [0, 1]
    assert table.rows[0][3] is None
    assert "bigram" in table.caption


def test_an_empty_split_is_a_usage_error(tmp_path):
    tiny = make_random_cache(tmp_path, [5, 5])
    empty = next(name for name in SPLITS if not len(tiny.sequences(name)))
    with pytest.raises(UsageError, match=f"the {empty} split of this cache is empty"):
        evaluate(tiny, split=empty)


def test_a_layer_that_the_cache_lacks_is_named(tiny_cache):
    with pytest.raises(NotFoundError, match="layer 9"):
        evaluate(tiny_cache, layers=(9,))


def test_offsets_longer_than_every_sequence_are_refused(tiny_cache):
    with pytest.raises(UsageError, match=r"longer than the offsets \(500,\) ask for"):
        evaluate(tiny_cache, offsets=(500,))
    with pytest.raises(UsageError, match="0 or more"):
        evaluate(tiny_cache, offsets=(-1,))


@pytest.mark.parametrize("empty", ["layers", "offsets"])
def test_at_least_one_layer_and_one_offset_are_named(tiny_cache, empty):
    options: dict[str, Any] = {empty: ()}
    with pytest.raises(UsageError, match="name at least one"):
        evaluate(tiny_cache, **options)


@pytest.mark.parametrize("offset", [0, 2])
def test_heatmap_cells_are_the_lens_of_one_position(tiny_cache, offset):
    found = heatmap(tiny_cache, offset=offset, split="train", width=6, start=1)
    start = int(tiny_cache.sequence_start[found.sequence]) + 1
    assert found.tokens == tuple(f"#{i}" for i in tiny_cache.tokens[start : start + 6])
    layer, token = 1, 3
    q = log_softmax(tiny_cache.head.logits(tiny_cache.residual_array(layer)[start + token]))
    p = log_softmax(tiny_cache.head.logits(tiny_cache.residual_array(2)[start + token + offset]))
    assert found.top[layer][token] == tuple(f"#{i}" for i in np.argsort(-q)[:5])
    assert found.targets[token] == f"#{p.argmax()}"
    np.testing.assert_allclose(found.probability[layer, token], np.exp(np.sort(q)[::-1][:5]), 1e-4)
    assert found.entropy[layer, token] == pytest.approx(-(np.exp(q) * q).sum(), rel=1e-4)
    assert found.kl[layer, token] == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)


def test_an_offset_beyond_every_sequence_has_no_row(tiny_cache):
    assert evaluate(tiny_cache, offsets=(0, 500)).offsets == (0,)


def test_heatmap_beyond_the_sequence_is_refused(tiny_cache):
    with pytest.raises(UsageError, match="none at 400"):
        heatmap(tiny_cache, sequence=0, start=400)


@pytest.mark.parametrize(
    ("pieces", "decoder", "names"),
    [
        # Byte-level BPE: a space, a line break, a word, the first byte of a longer letter.
        (["Ġa", "Ċ", "b", "â"], "ByteLevel", ["␣a", "\\n", "b", "\\<E2>"]),
        # SentencePiece, whose decoder drops a leading space.
        (["▁a", "▁", "b", "cd"], "Metaspace", ["␣a", "␣", "b", "cd"]),
    ],
)
def test_token_names_keep_spaces_and_odd_bytes(tmp_path, pieces, decoder, names):
    from tokenizers import Tokenizer, decoders, models

    tiny = make_random_cache(tmp_path, [5, 5])
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.decoder = getattr(decoders, decoder)()
    tokenizer.save(str(tiny.path / "head" / "tokenizer.json"))
    named = TokenNames(tiny)
    assert [named(token) for token in range(5)] == [*names, "#4"]


def test_bytes_that_are_no_character_have_names_of_their_own(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    tiny = make_random_cache(tmp_path, [5, 5])
    pieces = ["â", "ã", "âĤ", "âĤ¬", "Ċ"]  # bytes E2, E3, E2 82, E2 82 AC (the euro), 0A
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(tiny.path / "head" / "tokenizer.json"))
    named = TokenNames(tiny)
    assert [named(n) for n in range(5)] == ["\\<E2>", "\\<E3>", "\\<E2>\\<82>", "€", "\\n"]


def test_names_show_spaces_and_line_breaks():
    assert visible(" a\n\tb\x00�") == "␣a\\n\\tb\\x00�"


def test_different_texts_have_different_names():
    texts = [
        "\n",
        "\\n",
        "\\\\n",
        " ",
        "␣",
        "\\u2423",
        "\x80",
        "\udc80",
        "\\x80",
        "\\<80>",
        "\u200c",
        "a\u200cb",
        "ab",
        "\u200cab",
        "no token",
        "\ufeff",
        "",
    ]
    names = [visible(text) for text in texts]
    assert len({*names, UNDEFINED}) == len(texts) + 1
    persian, family = "\u0645\u06cc\u200c\u062e\u0648", "\U0001f469\u200d\U0001f467"
    assert [visible(persian), visible(family)] == [persian, family]
