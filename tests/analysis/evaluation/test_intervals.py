"""Intervals cover other documents; what is tested was not counted; few rows do not hide."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.errors import ResiduaWarning
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import PairScope
from residua.cli import main
from residua.probes.base import resampling as resampling_module
from residua.probes.base.resampling import ResamplingUnits, resampling_counts
from residua.probes.baselines.ngrams import FOLDS, Bigram
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.error_share import error_shares
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.saved.save import load_probe, save_probe

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, DEPTH, CONTEXT = 6, 23, 2, 16


def make_long_documents_cache(root: Path, documents: int = 40, size: int = 83) -> ActivationCache:
    """Long documents over several sequences, with borders inside; each has a shift of its own."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(size // 2, size, documents)
    document = np.repeat(rng.permutation(documents), sizes)
    n = len(document) // CONTEXT * CONTEXT
    document = document[:n]
    shift = rng.normal(size=(documents, WIDTH)) * 2
    layers = [rng.normal(size=(n, WIDTH)) + la * shift[document] for la in range(DEPTH + 1)]
    # Each document has words of its own: a bigram that has seen it is far better on it.
    ids = (document * 5 + rng.integers(0, 4, n)) % VOCAB
    head = random_head(WIDTH, VOCAB)
    return make_cache(root, layers, [CONTEXT] * (n // CONTEXT), head, ids, documents=document)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return make_long_documents_cache(tmp_path_factory.mktemp("clustered"))


def kl_by_hand(cache: ActivationCache, rows: np.ndarray, layer: int) -> np.ndarray:
    """KL(model, logit lens) in nats at `rows`, float64."""
    p, q = (
        logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for logits in (
            cache.head.logits(cache.residual_array(la).take(rows)).astype(float)
            for la in (DEPTH, layer)
        )
    )
    return (np.exp(p) * (p - q)).sum(-1)


def test_intervals_resample_documents_wherever_their_positions_lie(cache: ActivationCache) -> None:
    found = evaluate(cache, split="all", offsets=[0, 2], layers=[0], seed=3)
    documents = cache.array("tokens/row_id")[:]
    assert (found.unit, found.units) == ("document", len(np.unique(documents)))
    kl = kl_by_hand(cache, np.arange(cache.positions), 0)
    rng = np.random.default_rng(3)
    names = np.unique(documents)
    means = []
    for drawn in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=500):
        rows = np.concatenate(
            [np.flatnonzero(documents == name) for name in np.repeat(names, drawn)]
        )
        means.append(kl[rows].mean())
    row = found.select("logit", 0)[0]
    low, high = np.percentile(means, (2.5, 97.5))
    assert (row.kl_low, row.kl_high) == (
        pytest.approx(low, rel=1e-5),
        pytest.approx(high, rel=1e-5),
    )
    # What sequences would give is narrower: positions of one document are alike.
    sequence = np.arange(cache.positions) // CONTEXT
    sums, counts = np.bincount(sequence, kl), np.bincount(sequence)
    weights = resampling_counts(len(counts), 3)
    narrow = np.percentile((weights @ sums) / (weights @ counts), (2.5, 97.5))
    assert high - low > 1.2 * (narrow[1] - narrow[0])


def test_one_document_falls_back_to_sequences_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(96, WIDTH)) for _ in range(DEPTH + 1)]
    head = random_head(WIDTH, VOCAB)
    cache = make_cache(tmp_path, layers, [16] * 6, head, documents=np.zeros(96))
    found = evaluate(cache, split="all", offsets=[0])
    assert (found.unit, found.units) == ("sequence", 6)
    assert any("too narrow" in note for note in found.notes)
    assert found.select("logit", 0)[0].kl_low is not None


def test_few_documents_are_said_to_give_narrow_intervals(tmp_path: Path) -> None:
    few = make_long_documents_cache(tmp_path, documents=5)
    assert any("only 5 documents" in note for note in evaluate(few, split="all").notes)


def test_more_documents_than_units_are_put_together(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(cache, split="all", offsets=[0], layers=[0]).select("logit", 0)[0]
    monkeypatch.setattr(resampling_module, "MOST_UNITS", 20)
    units = ResamplingUnits.of(cache, cache.sequences("all"), 0)
    assert (units.count, units.n_resampled) == (40, 20)
    assert np.bincount(units.unit_numbers).astype(bool).sum() == 20
    documents = cache.array("tokens/row_id")[:]
    assert (
        len({(d, s) for d, s in zip(documents.tolist(), units.unit_numbers.tolist(), strict=True)})
        == 40
    )
    grouped = evaluate(cache, split="all", offsets=[0], layers=[0]).select("logit", 0)[0]
    assert grouped.kl == pytest.approx(whole.kl, rel=1e-12)
    width = [row.kl_high - row.kl_low for row in (grouped, whole) if row.kl_high and row.kl_low]
    assert width[0] == pytest.approx(width[1], rel=0.5)


@pytest.mark.parametrize("split", ["train", "all"])
def test_the_bigram_was_not_counted_on_what_it_is_tested_on(
    cache: ActivationCache, split: str
) -> None:
    found = evaluate(cache, split=split, offsets=[1], layers=[0]).select("bigram", 1)[0]
    ids, documents = cache.tokens[:].astype(int), cache.array("tokens/row_id")[:]
    sequence = np.arange(cache.positions) // CONTEXT
    train = cache.sequence_split[sequence] == 0
    inside = np.append((documents[1:] == documents[:-1]) & (sequence[1:] == sequence[:-1]), False)
    losses = []
    taken = np.isin(sequence, cache.sequences(split))
    for fold in range(FOLDS):
        first = np.flatnonzero(train & inside & (documents % FOLDS != fold))
        counts = np.zeros((VOCAB, VOCAB))
        np.add.at(counts, (ids[first], ids[first + 1]), 1)
        types, seen = (counts > 0).sum(1, keepdims=True), counts.sum(0)
        distinct = (seen > 0).sum()
        prior = (seen + distinct / VOCAB) / (seen.sum() + distinct)
        total = counts.sum(1, keepdims=True) + types
        table = np.where(total > 0, (counts + types * prior) / np.maximum(total, 1), prior)
        # Targets s of pairs (s - 1, s) whose text goes on.
        s = np.flatnonzero(taken & inside & np.append(False, inside[:-1]))
        s = s[documents[s] % FOLDS == fold]
        losses += (-np.log(table[ids[s], ids[s + 1]])).tolist()
    assert found.nll_text == pytest.approx(np.mean(losses), rel=1e-5)
    own = evaluate(cache, [Bigram().fit(cache)], split=split, offsets=[1], layers=[0])
    seen = own.select("bigram", 1)[0].nll_text
    assert seen is not None
    assert seen < np.mean(losses) - 0.15


def test_probes_fitted_on_what_is_evaluated_are_named(cache: ActivationCache) -> None:
    probe = RidgeProbe().fit(cache, keep=False)
    assert any("ridge" in note for note in evaluate(cache, [probe], split="train").notes)
    assert not any("fitted on" in note for note in evaluate(cache, [probe], split="test").notes)


def make_attention_sink_cache(
    root: Path, size: int, tokens: int = 30, sequences: int = 60
) -> ActivationCache:
    """A linear map under noise; the first position of each sequence is `size` in one coordinate."""
    rng = np.random.default_rng(0)
    n = sequences * tokens
    x = rng.normal(size=(n, WIDTH))
    y = x @ rng.normal(size=(WIDTH, WIDTH)) + 0.5 * rng.normal(size=(n, WIDTH))
    for rows in (x, y):
        rows[::tokens, 3] += size * (1 + 0.05 * rng.normal(size=sequences))
    return make_cache(root, [x, y], [tokens] * sequences, random_head(WIDTH, VOCAB))


def test_first_positions_that_dominate_are_warned_of_and_can_be_left_out(tmp_path: Path) -> None:
    from sklearn.linear_model import Ridge

    cache = make_attention_sink_cache(tmp_path, 1000)
    with pytest.warns(ResiduaWarning, match="drop_first=1"):
        all_rows = RidgeProbe(layers=[0]).fit(cache, keep=False)
    row = all_rows.metrics()[0]
    assert row["first_target"] > 0.9
    words = ["fit", "ridge", str(cache.path), "--layers", "0", "--no-keep-moments"]
    shown = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "probe")])
    assert shown.exit_code == 0, shown.output
    assert [line for line in shown.stderr.splitlines() if "--drop-first 1" in line]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = RidgeProbe(layers=[0], drop_first=1).fit(cache, keep=False)
    rows = cache.positions_of(cache.sequences("train"))
    rest = rows[rows % 30 != 0]
    x, y = (np.asarray(cache.residual_array(la)[:], float)[rest] for la in (0, 1))
    want = Ridge(alpha=probe.alpha_[0, 0]).fit(x, y)
    np.testing.assert_allclose(probe.map().weight.T, want.coef_, rtol=1e-4, atol=1e-5)
    assert probe.n_[0, 0] == len(rest)
    assert probe.r2_[0, 0] < all_rows.r2_[0, 0]
    assert probe.metrics()[0]["first_error"] == 0
    evaluated = evaluate(cache, [probe], offsets=[0], split="all", drop_first=1)
    assert evaluated.n == cache.positions - len(cache.sequences("all"))
    assert not any("few rows" in note for note in evaluated.notes)
    evaluated = evaluate(cache, [all_rows], offsets=[0], split="all")
    assert any("few rows" in note for note in evaluated.notes)
    assert any("largest 0.1 %" in fact for fact in evaluated.facts())
    assert "intervals resample" in evaluated.facts()[0]


def test_shares_of_the_error_are_those_of_the_rows_one_by_one(cache: ActivationCache) -> None:
    rng = np.random.default_rng(1)
    found = {
        (la, n, DEPTH): AffineMap(rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=WIDTH))
        for la in (0, 1)
        for n in (0, 3)
    }
    sequences, document = cache.sequences("all"), cache.array("tokens/row_id")[:]
    for scope in (PairScope(), PairScope(True, 2)):
        shares = error_shares(cache, found, sequences, scope, max_positions=10**6)
        for (layer, offset, _), used in found.items():
            t = np.arange(cache.positions - offset)
            keep = t // CONTEXT == (t + offset) // CONTEXT
            keep &= (document[t] == document[t + offset]) | scope.across_documents
            t = t[keep & (t % CONTEXT >= scope.drop_first)]
            x, y = (np.asarray(cache.residual_array(la)[:], float) for la in (layer, DEPTH))
            x, y = x[t], y[t + offset]
            error = ((used(x) - y) ** 2).sum(1)
            spread = ((y - y.mean(0)) ** 2).sum(1)
            top = -(-len(t) // 1000)
            share = shares[layer, offset, DEPTH]
            for name, values in (("error", error), ("target", spread)):
                want = np.sort(values)[-top:].sum() / values.sum()
                assert getattr(share, f"top_{name}") == pytest.approx(want, rel=1e-4)
                want = values[t % CONTEXT == 0].sum() / values.sum()
                assert getattr(share, f"first_{name}") == pytest.approx(want, rel=1e-4)


def test_a_lens_leaves_first_positions_out_too(tmp_path: Path) -> None:
    cache = make_attention_sink_cache(tmp_path, 1000)
    lens = TunedLens(layers=[0], steps=5, batch=64, drop_first=1).fit(cache)
    row = lens.metrics()[0]
    assert row["n"] == sum(cache.sequence_length[cache.sequences("train")] - 1)
    assert row["first_error"] == 0
    back = load_probe(save_probe(lens, tmp_path / "lens"))
    assert back.get_params() == lens.get_params()
    assert back.metrics() == lens.metrics()


def test_scope_and_shares_are_saved_and_older_probes_had_all_pairs(
    cache: ActivationCache, tmp_path: Path
) -> None:
    probe = RidgeProbe(1, [0], drop_first=2).fit(cache, keep=False)
    back = load_probe(save_probe(probe, tmp_path / "new"))
    assert back.get_params() == probe.get_params()
    assert back.metrics() == probe.metrics()
    from residua.cache.files.json_files import read_json, write_json

    config = read_json(tmp_path / "new" / "config.json")
    for name in ("across_documents", "drop_first"):
        config["params"].pop(name)
    write_json(tmp_path / "new" / "config.json", {k: v for k, v in config.items() if k != "sha256"})
    assert load_probe(tmp_path / "new").across_documents is True


def test_the_command_line_has_both_options_and_says_what_they_do(
    cache: ActivationCache, tmp_path: Path
) -> None:
    root = ["--root", str(cache.path.parent), "--json"]

    def run(*args: str) -> dict:
        found = CliRunner().invoke(main, [*args, *root])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    id_ = cache.id[:12]
    apart = run("fit", "ridge", id_, "--offsets", "1", "--out", str(tmp_path / "a"))
    options = ["--offsets", "1", "--across-documents", "--drop-first", "1"]
    joined = run("fit", "ridge", id_, *options, "--out", str(tmp_path / "b"))
    train = int(cache.sequence_length[cache.sequences("train")].sum())
    sequences = len(cache.sequences("train"))
    assert joined["metrics"][0]["n"] == train - 2 * sequences
    share = apart["metrics"][0]["crossing"]
    assert share > 0
    assert apart["metrics"][0]["n"] == round((train - sequences) * (1 - share))
    value = run("evaluate", id_, str(tmp_path / "b"), *options[2:])
    assert value["across_documents"] is True
    assert value["drop_first"] == 1
    assert value["unit"] == "document"
    assert value["crossing"]["1"] > 0
    assert value["squared_errors"][0]["probe"] == "ridge"
    plain = CliRunner().invoke(main, ["evaluate", id_, str(tmp_path / "a"), *root[:2]])
    assert "intervals resample the" in plain.output
    assert "pairs that join two documents are left out" in plain.output


def test_the_facts_say_how_wide_intervals_are_and_what_narrows_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(1200, 8)) for _ in range(2)]
    tiny_cache = make_cache(tmp_path, layers, [20] * 60, random_head(8, 30))
    evaluation = evaluate(tiny_cache, split="all", max_positions=tiny_cache.positions // 3)
    widths = sorted(
        (row.kl_high - row.kl_low) / (2 * row.kl)
        for row in evaluation.rows
        if row.kl and row.kl_low is not None and row.kl_high is not None
    )
    width = evaluation.kl_half_width
    assert width is not None
    assert width == widths[len(widths) // 2]
    assert width > 0.05
    wanted = min(tiny_cache.positions, evaluation.positions * (width / 0.05) ** 2)
    assert (
        f"take about {wanted:,.0f} of the {tiny_cache.positions:,} positions"
        in (evaluation.facts()[0])
    )
    whole = evaluate(tiny_cache, split="all", max_positions=tiny_cache.positions)
    assert "max_positions" not in whole.facts()[0]
