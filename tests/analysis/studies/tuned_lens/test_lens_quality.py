"""Perplexity, bias, echo and early guesses are those of numpy and of what was planted."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

import residua
from residua.analysis.evaluation.lens_heatmap import heatmap
from residua.analysis.studies.results.study_result import StudyResult
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.analysis.studies.trajectories.readings import measure_trajectories
from residua.analysis.studies.tuned_lens.early_guesses import early_guess_rows, frequency_buckets
from residua.analysis.studies.tuned_lens.lens_layers import lens_layer_rows, marginal_kl
from residua.analysis.studies.tuned_lens.lens_quality import MEASURES, study_tuned_lens
from residua.analysis.studies.tuned_lens.passage_cells import (
    choose_passage,
    find_token,
    passage_rows,
    read_passage,
)
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.logit_lens import LogitLens

from ....support.models import texts as random_texts
from ....support.planted_tops import cache_with_tops
from ....support.synthetic import make_cache, random_head

if TYPE_CHECKING:
    import torch

WIDTH, VOCAB = 8, 30
LENGTHS = [30] * 20


def random_cache(root: Path, spoil: bool = False) -> ActivationCache:
    rng = np.random.default_rng(0)
    layers = [rng.normal(0, 1 + layer, (sum(LENGTHS), WIDTH)) for layer in range(3)]
    if spoil:
        layers[1][4], layers[2][9] = np.nan, np.inf
    return make_cache(root, layers, LENGTHS, random_head(WIDTH, VOCAB))


class SaysAnotherPosition:
    """Says at every layer what the model says at a permuted position: no marginal bias, much KL."""

    kind = "permuted"

    def __init__(self, cache: ActivationCache) -> None:
        order = np.random.default_rng(1).permutation(cache.positions)
        self.states = np.asarray(cache.residual_array(cache.n_blocks)[:])[order]

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(0, 0), (1, 0)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        import torch

        assert batch.position is not None
        return batch.head(torch.from_numpy(self.states[batch.position.numpy()]))


class SaysOneDistribution:
    """Says the same at every position."""

    kind = "constant"

    def __init__(self, probabilities: np.ndarray) -> None:
        self.log_q = np.log(probabilities).astype(np.float32)

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(0, 0), (1, 0)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        import torch

        return torch.from_numpy(np.tile(self.log_q, (len(batch.last_token), 1)))


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    q = np.exp(logits - logits.max(1, keepdims=True))
    return q / q.sum(1, keepdims=True)


@pytest.mark.parametrize("spoil", [False, True])
def test_rows_of_layers_are_those_of_plain_numpy(tmp_path: Path, spoil: bool) -> None:
    cache = random_cache(tmp_path, spoil)
    sample = choose_positions(cache, "all")
    readings = measure_trajectories(
        sample,
        {"logit": LogitLens.of(cache, 0)},
        measures=MEASURES,
        marginals=True,
        device="cpu",
        progress=None,
    )
    text, tokens = sample.text_tokens, sample.tokens
    with np.errstate(invalid="ignore"):
        p = softmax(cache.head.logits(cache.residual_array(2)[sample.positions]))
        for row in lens_layer_rows(sample, readings):
            q = softmax(cache.head.logits(cache.residual_array(row.layer)[sample.positions]))
            lens, both = np.isfinite(q).all(1), np.isfinite(q).all(1) & np.isfinite(p).all(1)
            assert row.n == both.sum()
            known = lens & (text >= 0)
            loss = -np.log(q[known, text[known]]).mean()
            assert row.cross_entropy == pytest.approx(loss, rel=1e-4)
            assert row.perplexity == pytest.approx(np.exp(loss), rel=1e-3)
            assert row.bits == pytest.approx(loss / np.log(2), rel=1e-4)
            kl = (p[both] * np.log(p[both] / q[both])).sum(1).mean()
            assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
            assert row.echo == pytest.approx((q[lens].argmax(1) == tokens[lens]).mean())
            excess = (q[both].argmax(1) == tokens[both]).mean()
            excess -= (p[both].argmax(1) == tokens[both]).mean()
            assert row.echo_excess == pytest.approx(excess)
            agrees = (q[both].argmax(1) == p[both].argmax(1)).mean()
            assert row.agreement == pytest.approx(agrees)
            mean_p, mean_q = p[np.isfinite(p).all(1)].mean(0), q[both].mean(0)
            bias = (mean_p * np.log(mean_p / mean_q)).sum()
            assert row.marginal_bias == pytest.approx(bias, rel=1e-3, abs=1e-6)
            assert row.perplexity_interval[0] is not None
            assert row.perplexity is not None
            assert row.perplexity_interval[1] is not None
            assert row.perplexity_interval[0] < row.perplexity < row.perplexity_interval[1]
            rank = 1 + (q[both] > q[both, p[both].argmax(1)][:, None]).sum(1)
            assert row.rank == np.median(rank)


def test_a_known_marginal_bias_is_found(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    sample = choose_positions(cache, "all")
    uniform = np.full(VOCAB, 1 / VOCAB)
    lenses: Any = {
        "permuted": SaysAnotherPosition(cache),
        "constant": SaysOneDistribution(uniform),
    }
    readings = measure_trajectories(
        sample, lenses, measures=MEASURES, marginals=True, device="cpu", progress=None
    )
    rows = {(row.lens, row.layer): row for row in lens_layer_rows(sample, readings)}
    p = softmax(cache.head.logits(cache.residual_array(2)[sample.positions])).mean(0)
    permuted, constant = rows["permuted", 1], rows["constant", 1]
    assert permuted.marginal_bias == pytest.approx(0, abs=1e-6)
    assert permuted.kl is not None
    assert permuted.kl > 1
    entropy = -(p * np.log(p)).sum()
    assert constant.marginal_bias == pytest.approx(np.log(VOCAB) - entropy, rel=1e-3)
    assert constant.marginal_bias_bits == pytest.approx(
        np.log2(VOCAB) - entropy / np.log(2), rel=1e-3
    )
    assert constant.entropy == pytest.approx(np.log(VOCAB), rel=1e-5)
    assert marginal_kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == np.inf
    assert marginal_kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    assert marginal_kl(np.array([1.0, np.nan]), np.array([0.5, 0.5])) is None


def row_of(result: StudyResult, table: str, **fields: Any) -> Any:
    (row,) = [
        row
        for row in result.table(table).rows
        if all(getattr(row, name) == value for name, value in fields.items())
    ]
    return row


def test_planted_echoes_and_early_guesses_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    n, vocab = sum(LENGTHS), 14
    ids = rng.choice(vocab, n, p=np.r_[0.35, np.full(13, 0.05)])
    final = rng.integers(0, vocab, n)
    # Layer 0 echoes, layer 1 says the most frequent token, layer 2 is right half of the time.
    half = np.where(np.arange(n) % 2, final, (final + 1) % vocab)
    tops = np.stack([ids, np.zeros(n, np.int64), half, final])
    cache = cache_with_tops(tmp_path, tops, LENGTHS, vocab, ids)
    result = study_tuned_lens(cache, split="all", progress=None, device="cpu")
    assert row_of(result, "layers", layer=0).echo == 1
    assert row_of(result, "layers", layer=1).echo == pytest.approx((ids == 0).mean())
    assert row_of(result, "layers", layer=3).echo == pytest.approx((ids == final).mean())
    assert row_of(result, "layers", layer=2).agreement == pytest.approx(0.5)
    frequent = np.argsort(-np.bincount(ids, minlength=vocab), kind="stable")[:10]
    early = row_of(result, "early-guesses", layer=1, bucket="top 10")
    assert (early.n, early.share) == (n, 1)
    assert early.revised == pytest.approx((final != 0).mean())
    assert early.model_share == pytest.approx(np.isin(final, frequent).mean())
    inside = np.arange(n) % 30 != 29
    following = np.roll(ids, -1)
    assert early.text_share == pytest.approx(np.isin(following[inside], frequent).mean())
    assert row_of(result, "early-guesses", layer=1, bucket="11-100").n == 0
    assert row_of(result, "early-guesses", layer=1, bucket="11-100").revised is None
    later = row_of(result, "early-guesses", layer=2, bucket="top 10")
    is_frequent = np.isin(half, frequent)
    assert later.share == pytest.approx(is_frequent.mean())
    assert later.revised == pytest.approx((half != final)[is_frequent].mean())
    assert row_of(result, "early-guesses", layer=3, bucket="all").revised is None
    # Without a given lens, nothing is transferred.
    assert {table.name for table in result.tables} == {
        "layers",
        "early-guesses",
        "layer-pairs",
        "layer-spread",
        "passage",
    }


@pytest.mark.parametrize("lengths", [[1], [1, 1], [5]])
def test_few_positions_give_what_is_defined(tmp_path: Path, lengths: list[int]) -> None:
    ids = np.arange(1, 1 + sum(lengths))
    cache = cache_with_tops(tmp_path, np.stack([ids, ids + 1]), lengths, 12, ids)
    result = study_tuned_lens(cache, split="all", progress=None, device="cpu")
    first = row_of(result, "layers", layer=0)
    assert (first.echo, first.agreement) == (1, 0)
    assert (first.cross_entropy is None) == (max(lengths) == 1)
    json.dumps(result.to_dict(), allow_nan=False)


def test_buckets_count_ranks_of_frequency() -> None:
    counts = np.random.default_rng(0).permutation(2000)
    buckets = frequency_buckets(counts)
    assert np.bincount(buckets).tolist() == [10, 90, 900, 1000]
    assert counts[buckets == 0].min() > counts[buckets == 1].max()
    assert frequency_buckets(np.zeros(12, np.int64)).tolist() == [0] * 10 + [1] * 2


def test_undefined_guesses_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tops = rng.integers(0, 12, (3, sum(LENGTHS)))
    tops[0, 2], tops[2, 5] = -1, -1
    cache = cache_with_tops(tmp_path, tops, LENGTHS, 12)
    sample = choose_positions(cache, "all")
    readings = measure_trajectories(
        sample, {"logit": LogitLens.of(cache, 0)}, measures=["kl"], progress=None, device="cpu"
    )
    rows = {(r.layer, r.bucket): r for r in early_guess_rows(sample, readings, np.arange(12))}
    n = sum(LENGTHS)
    assert rows[0, "all"].n == rows[2, "all"].n == n - 1
    assert rows[1, "all"].n == n
    both = (tops[0] >= 0) & (tops[2] >= 0)
    assert rows[0, "all"].revised == pytest.approx((tops[0] != tops[2])[both].mean())


def test_cells_of_a_passage_are_those_of_the_heatmap(tiny_cache: ActivationCache) -> None:
    ridge = residua.RidgeProbe([0], alpha=1.0).fit(tiny_cache, progress=None, keep=False)
    lenses: Any = {"logit": LogitLens.of(tiny_cache, 0), "ridge": ridge}
    sequence = int(tiny_cache.sequences("test")[0])
    passage = choose_passage(tiny_cache, "test", sequence, 3, 9, "cpu")
    readings = read_passage(tiny_cache, passage, lenses, 5, "cpu", None)
    rows = passage_rows(tiny_cache, passage, readings)
    assert len(rows) == 2 * 9 * (tiny_cache.n_blocks + 1)
    for name, lens in lenses.items():
        drawn = heatmap(tiny_cache, lens, sequence=sequence, start=3, width=9, device="cpu")
        # The last layer of a trajectory is the model, whatever the lens makes of it.
        below = [row for row in rows if row.lens == name and row.layer < tiny_cache.n_blocks]
        for row in below:
            y, x = drawn.layers.index(row.layer), row.index - 3
            assert (row.token, row.target) == (drawn.tokens[x], drawn.targets[x])
            assert row.top == drawn.top[y][x][0]
            assert row.kl == pytest.approx(float(drawn.kl[y, x]), rel=1e-3, abs=1e-5)
            assert row.entropy == pytest.approx(float(drawn.entropy[y, x]), rel=1e-4)
            assert row.max_probability == pytest.approx(float(drawn.probability[y, x, 0]), rel=1e-4)
            assert row.tracked_rank is not None
            assert row.tracked_rank >= 1
    # The default passage is the telling one; it ends with its sequence.
    assert choose_passage(tiny_cache, "test", None, None, 9, "cpu").width == 9
    length = int(tiny_cache.sequence_length[sequence])
    assert choose_passage(tiny_cache, "test", sequence, length - 2, 9, "cpu").width == 2


def test_passages_and_tokens_that_are_not_there_are_refused(tiny_cache: ActivationCache) -> None:
    for arguments, message in (
        ((None, 3, 9), "name the sequence"),
        ((10_000, 0, 9), "sequence must lie in"),
        ((0, 10_000, 9), "none at 10000"),
        ((0, 0, 0), "at least 1 token"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_passage(tiny_cache, "test", *arguments, "cpu")
    assert find_token(tiny_cache, None) is None
    assert find_token(tiny_cache, 7) == 7
    tokenizer = tiny_cache.tokenizer()
    text = tokenizer.decode([100])
    if len(tokenizer.encode(text, add_special_tokens=False).ids) == 1:
        assert find_token(tiny_cache, text.replace(" ", "␣")) == 100
    with pytest.raises(UsageError, match="no token 9999"):
        find_token(tiny_cache, 9999)
    with pytest.raises(UsageError, match="give one, such as"):
        find_token(tiny_cache, "certainly several tokens")
    with pytest.raises(UsageError, match="0 or more"):
        study_tuned_lens(tiny_cache, transfer_positions=-1, progress=None)


def test_given_readings_give_the_same_study(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    ridge = residua.RidgeProbe([0], alpha=1.0).fit(cache, progress=None, keep=False)
    options: Any = {"split": "all", "progress": None, "device": "cpu"}
    alone = study_tuned_lens(cache, [ridge], **options)
    sample = choose_positions(cache, "all")
    lenses = {"logit": LogitLens.of(cache, 0), "ridge": ridge}
    readings = measure_trajectories(sample, lenses, marginals=True, progress=None, device="cpu")
    shared = study_tuned_lens(cache, [ridge], sample=sample, readings=readings, **options)
    assert shared.to_dict() == alone.to_dict()
    assert {row.lens for row in alone.table("transfer").rows} == {"ridge"}
    assert alone.figure("transfer-ridge").rows
    without = dict(readings)
    for lens in without.values():
        object.__setattr__(lens, "marginal", None)
    noted = study_tuned_lens(cache, [ridge], sample=sample, readings=without, **options)
    assert any("without marginals" in note for note in noted.notes)
    assert row_of(noted, "layers", lens="ridge", layer=1).marginal_bias is None


def test_lenses_that_are_not_affine_are_named(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    lens: Any = SaysAnotherPosition(cache)
    result = study_tuned_lens(cache, [lens], split="all", progress=None, device="cpu")
    assert any("permuted has no affine map" in note for note in result.notes)
    assert row_of(result, "layers", lens="permuted", layer=1).echo_interval[0] is not None


@pytest.mark.slow
def test_the_command_tells_classes_and_writes_a_page(model_folder: Path, tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": text, "kind": "ab"[number % 2]})
        for number, text in enumerate(random_texts(40))
    ]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(rows))
    cache = residua.extract(
        str(model_folder), str(data), root=tmp_path / "root", context=32, pack=False
    )
    page = tmp_path / "lenses.html"
    arguments = ["study", "tuned-lens", str(cache.path), "--json", "--split", "all"]
    arguments += ["--label", "kind", "--html", str(page)]
    done = CliRunner().invoke(main, [*arguments, "--width", "6", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.output)
    classifiers = value["tables"]["profile-classifiers"]
    assert {row["classifier"] for row in classifiers} == {"5 nearest", "logistic regression"}
    # The texts of both kinds are alike.
    assert all(row["accuracy"] < 0.75 for row in classifiers)
    assert "layer by layer" in page.read_text()
    wrong = CliRunner().invoke(main, ["study", "tuned-lens", str(cache.path), "--label", "colour"])
    assert wrong.exit_code == 2
    assert "no label 'colour'" in wrong.output
