"""Claims about controls: the view is the plain permutation, nothing is learnt where nothing is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.linear_model import Ridge

import residua
from residua.analysis.console.options import CONTROLS
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.report.html_report import write_report
from residua.analysis.report.probe_style import color, label, stroke
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import BASELINES, main
from residua.probes.baselines.ngrams import Unigram
from residua.probes.controls import cache_views as views
from residua.probes.controls.cache_views import CacheView, NextToken, view_of
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.controls.position_shuffle import PositionShuffle
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.saved import save
from residua.probes.saved.library import load_probe_for, probe_path
from residua.probes.vocabulary.vocab_probe import VocabProbe
from residua.sample import MODEL_DIR, TEXT_PATH

from ...support.defined import not_none
from ...support.synthetic import make_cache, random_head

VOCAB, D = 11, 6
LENGTHS = np.random.default_rng(4).integers(3, 40, 150).tolist()


def cache_of(root: Path, lengths: list[int] = LENGTHS, dtype: str = "float32") -> ActivationCache:
    """Layer 2 at t + 1 is a linear map of layer 1 at t and layer 0 at t + 1, and a little noise."""
    rng, n = np.random.default_rng(0), sum(lengths)
    first, second = (rng.normal(0, 1, (n, D)) for _ in range(2))
    a, b = rng.normal(0, 1, (2, D, D))
    third = rng.normal(0, 3, D) + np.roll(second, 1, 0) @ a + first @ b + rng.normal(0, 0.1, (n, D))
    head = random_head(D, VOCAB)
    return make_cache(root, [first, second, third], lengths, head, dtype=dtype)


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> ActivationCache:
    return cache_of(tmp_path_factory.mktemp("caches"))


def rows_of(cache: ActivationCache, offset: int, split: str = "train") -> np.ndarray:
    """Positions t for which t + offset lies in the same sequence."""
    numbers = cache.sequences(split)
    lengths = cache.sequence_length[numbers]
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum()) - 1
    return cache.positions_of(numbers)[left >= offset]


def changed_rows(cache: ActivationCache, control: str, layer: int, offset: int, split="train"):
    """Rows and targets of a control, from whole arrays."""
    rows = rows_of(cache, offset, split)
    arrays = [cache.residual_array(la)[:] for la in cache.layers]
    moved = PositionShuffle(cache)
    x, y = arrays[layer][rows], arrays[2][rows + offset]
    if control == "shuffled":
        x = arrays[layer][moved(rows)]
    elif control == "permuted":
        y = arrays[2][moved(rows + offset)]
    else:
        x = np.hstack([x, arrays[0][rows + 1]])
    return x.astype(float), y.astype(float)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("offset", [1, 3])
def test_the_fit_is_that_of_the_changed_rows_in_memory(tiny_cache, control, layer, offset):
    probe = ControlProbe(RidgeProbe(offsets=offset, layers=[layer], alpha=5.0), control)
    fitted = probe.fit(tiny_cache).probe_.map(layer, offset)
    want = Ridge(alpha=5.0).fit(*changed_rows(tiny_cache, control, layer, offset))
    np.testing.assert_allclose(fitted.weight[:, :D], want.coef_.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.bias[:D], want.intercept_, rtol=1e-4, atol=1e-5)
    assert not fitted.weight[:, D:].any()
    assert not fitted.bias[D:].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("control", CONTROLS)
def test_rows_of_a_view_are_the_same_however_they_are_read(tmp_path, control, dtype):
    tiny = cache_of(tmp_path, dtype=dtype)
    view = view_of(tiny, control, 0)
    for layer in (*view.layers, view.n_blocks):
        array = view.residual_array(layer)
        whole = array[:]
        assert whole.shape == array.shape == (tiny.positions, view.d_model)
        assert whole.dtype == array.dtype == np.float32
        rows = np.array([5, 900, 17, 17])
        np.testing.assert_array_equal(array[rows], whole[rows])
        np.testing.assert_array_equal(array[3:50:4, 1], whole[3:50:4, 1])
        np.testing.assert_array_equal(array[-1], whole[-1])
        np.testing.assert_array_equal(array.read(30, 60), whole[30:60])
        stored = np.empty((30, view.d_model), array.layout.stored_dtype)
        array.read_stored(30, 60, stored)
        assert stored.nbytes == 30 * array.layout.row_bytes
        if dtype != "bfloat16" or array.layout.logical_dtype == "float32":
            np.testing.assert_array_equal(stored.astype(np.float32), whole[30:60])
    np.testing.assert_array_equal(view.residual(1).compute(), view.residual_array(1)[:])


def test_a_view_changes_one_thing_only(tiny_cache):
    same = {0, 1, 2}
    for control, changed in {"shuffled": same, "permuted": {3}, "next-token": set()}.items():
        view = view_of(tiny_cache, control, 0)
        for layer in range(4):
            plain = tiny_cache.residual_array(min(layer, 2))[:]
            found = view.residual_array(layer)[:, :D]
            assert np.array_equal(found, plain) == (layer not in changed)
        assert np.array_equal(view.tokens[:], tiny_cache.tokens[:]) == (control != "permuted")
        assert view.id != tiny_cache.id
        for name in ("train", "test"):
            assert np.array_equal(view.sequences(name), tiny_cache.sequences(name))


@pytest.mark.parametrize("control", ["shuffled", "permuted"])
def test_a_probe_finds_nothing_where_nothing_is(tiny_cache, control):
    probe = RidgeProbe(offsets=1, layers=[1]).fit(tiny_cache)
    assert probe.score(tiny_cache, split="test") > 0.3
    found = ControlProbe(RidgeProbe(offsets=1, layers=[1]), control).fit(tiny_cache)
    assert abs(found.score(tiny_cache, layer=1, offset=1, split="test")) < 0.02
    assert abs(found.metrics()[0]["r2"]) < 0.02


@pytest.mark.parametrize("control", ["shuffled", "permuted"])
def test_its_distribution_is_that_of_the_mean(tiny_cache, control):
    found = ControlProbe(RidgeProbe(offsets=1, layers=[1]), control).fit(tiny_cache)
    mean = tiny_cache.residual_array(2)[rows_of(tiny_cache, 1) + 1].mean(0)
    constant = torch.from_numpy(tiny_cache.head.logits(mean[None])).log_softmax(-1)
    model = torch.from_numpy(tiny_cache.head.logits(tiny_cache.residual_array(2)[:])).log_softmax(
        -1
    )
    targets = rows_of(tiny_cache, 1, "test") + 1
    want = (model.exp() * (model - constant))[targets].sum(-1).mean()
    row = next(r for r in evaluate(tiny_cache, [found]).rows if r.probe == f"ridge/{control}")
    assert row.kl == pytest.approx(float(want), rel=0.02)


@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("control", CONTROLS)
def test_evaluation_changes_the_rows_as_the_fit_does(tiny_cache, control, rows):
    probe = ControlProbe(RidgeProbe(offsets=2, layers=[1], alpha=0.1), control).fit(tiny_cache)
    plain = RidgeProbe(offsets=2, layers=[1], alpha=0.1).fit(tiny_cache)
    found = evaluate(tiny_cache, [plain, probe], split="test", batch_rows=rows)
    x, _ = changed_rows(tiny_cache, "next-token" if "next" in control else control, 1, 2, "test")
    fitted = probe.probe_.map(1, 2)
    logits = tiny_cache.head.logits((x @ fitted.weight + fitted.bias)[:, :D].astype(np.float32))
    q = torch.from_numpy(logits).log_softmax(-1)
    targets = rows_of(tiny_cache, 2, "test") + 2
    p = torch.from_numpy(tiny_cache.head.logits(tiny_cache.residual_array(2)[targets])).log_softmax(
        -1
    )
    row = next(r for r in found.rows if r.probe == probe.kind)
    assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    alone = evaluate(tiny_cache, [plain], split="test", batch_rows=rows)
    assert [r for r in found.rows if r.probe == "ridge"] == alone.select("ridge", 2)


def test_the_next_token_explains_at_least_as_much(tiny_cache):
    probe = RidgeProbe(offsets=[1, 2], layers=[1], alpha=1e-6)
    both = ControlProbe(probe, "next-token").fit(tiny_cache)
    probe.fit(tiny_cache)
    for offset in (1, 2):
        where = {"layer": 1, "offset": offset, "split": "train"}
        assert both.score(tiny_cache, **where) >= probe.score(tiny_cache, **where) - 1e-9
    # At offset 1 layer 2 is, but for noise, made of both.
    assert both.score(tiny_cache, layer=1, offset=1, split="test") > 0.95


def test_the_last_token_of_a_sequence_has_no_next_one(tiny_cache):
    view = NextToken(tiny_cache)
    ends = tiny_cache.sequence_start + tiny_cache.sequence_length - 1
    found = view.residual_array(1)[ends]
    np.testing.assert_array_equal(found[:, D:], tiny_cache.residual_array(0)[ends])


@pytest.mark.parametrize("control", CONTROLS)
def test_a_saved_control_is_the_same(tiny_cache, control, tmp_path):
    probe = ControlProbe(RidgeProbe(offsets=1, layers=[1]), control, seed=3).fit(tiny_cache)
    path = residua.save_probe(probe, probe_path(tmp_path, probe))
    assert path.parent == tmp_path / "probes"
    assert path.name.startswith(f"{control}-ridge-{tiny_cache.id[:12]}-")
    again = load_probe_for(tiny_cache, path)
    assert again.kind == f"ridge/{control}"
    assert again.seed == 3
    assert again.pairs() == [(1, 1)]
    assert again.metrics() == probe.metrics()
    both = evaluate(tiny_cache, [probe, again])
    one, other = (both.select(name, 1)[0].kl for name in (probe.kind, f"{probe.kind} 2"))
    assert one == pytest.approx(other, rel=1e-6)
    one, other = (each.score(tiny_cache, layer=1, offset=1) for each in (probe, again))
    assert one == pytest.approx(other, rel=1e-12)


def test_the_probe_that_is_given_stays_as_it_is(tiny_cache):
    given = RidgeProbe(offsets=1, layers=[1])
    probe = ControlProbe(given).fit(tiny_cache)
    assert not hasattr(given, "maps_")
    assert probe.get_params() == {"probe": given, "control": "shuffled", "seed": 0}
    first = ControlProbe(given, seed=1).fit(tiny_cache)
    assert not np.array_equal(first.probe_.map().weight, probe.probe_.map().weight)


def test_nothing_is_written_into_the_cache(tmp_path):
    tiny = cache_of(tmp_path)
    before = sorted(path for path in tiny.path.rglob("*"))
    for control in CONTROLS:
        ControlProbe(RidgeProbe(offsets=1), control).fit(tiny)
    assert sorted(path for path in tiny.path.rglob("*")) == before


def test_mistakes_are_said(tiny_cache):
    ridge = RidgeProbe(offsets=(0, 1))
    with pytest.raises(UsageError, match="for offsets of 1 or more"):
        ControlProbe(ridge, "next-token").fit(tiny_cache)
    with pytest.raises(UsageError, match="control must be one of"):
        ControlProbe(ridge, "shufled").fit(tiny_cache)
    with pytest.raises(UsageError, match="fitted on a cache"):
        ControlProbe(ridge).fit(np.zeros((3, 2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="leave target out"):
        ControlProbe(RidgeProbe(target=1)).fit(tiny_cache)
    with pytest.raises(UsageError, match="leave keep out"):
        ControlProbe(ridge).fit(tiny_cache, keep=True)
    with pytest.raises(NotFoundError, match="layer 9"):
        ControlProbe(RidgeProbe(layers=[9])).fit(tiny_cache)
    with pytest.raises(Exception, match="not fitted"):
        ControlProbe(ridge).metrics()


def test_names_for_people(tiny_cache, tmp_path):
    assert label("ridge/shuffled 2") == "ridge lens, shuffled states 2"
    probe = ControlProbe(RidgeProbe(offsets=0, layers=[1])).fit(tiny_cache)
    page = write_report(evaluate(tiny_cache, [probe]), tmp_path / "report.html").read_text()
    assert "ridge lens, shuffled states" in page
    assert (stroke("ridge"), stroke("ridge/shuffled 2")) == (("-", "solid"), (":", "dot"))
    assert color("ridge/shuffled") == color("ridge") != color("ridge/shuffled 2")
    assert tuple(views.CONTROLS) == CONTROLS


def test_the_command_line_fits_controls_and_baselines(tiny_cache, tmp_path):
    def run(*args: object) -> str:
        words = [str(arg) for arg in (*args, "--root", tmp_path)]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return result.stdout

    where = tiny_cache.path
    assert "ridge/permuted" in run("fit", "ridge", where, "--control", "permuted")
    assert "trigram" in run("fit", "baseline", where, "--offsets", "0-2")
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "probes").iterdir())
    assert names == sorted([*BASELINES, "permuted"])
    shown = run("evaluate", where, "permuted", "trigram", "marginal", "--split", "train")
    assert "ridge/permuted KL" in shown
    assert "trigram: KL" in shown


def test_a_view_travels_to_another_process(tiny_cache):
    import pickle

    for kind in (CacheView, *views.CONTROLS.values()):
        view = kind(tiny_cache, 2)
        again = pickle.loads(pickle.dumps(view))
        assert again.id == view.id
        np.testing.assert_array_equal(again.residual_array(1)[:9], view.residual_array(1)[:9])


def best_constant(cache: ActivationCache, mean: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(vocab,)` nearest to `mean` among those that the head can give."""
    head = cache.head.torch()
    hidden = torch.from_numpy(cache.residual_array(2)[:].mean(0)).requires_grad_()
    search = torch.optim.LBFGS([hidden], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = -(mean * head(hidden).log_softmax(-1)).sum()
        value.backward()
        return value

    search.step(loss)
    return head(hidden).log_softmax(-1).detach()


@pytest.mark.parametrize("control", ["shuffled", "permuted"])
@pytest.mark.parametrize("kind", ["vocab", "head", "lens"])
def test_probes_fitted_by_kl_end_at_the_best_constant(tiny_cache, control, kind):
    """The mean of what the model says in the train split, or the nearest that the head can say."""
    probe = {
        "vocab": VocabProbe(offsets=1, layers=[1], loss="kl", epochs=12, batch=256, lr=0.01),
        "head": VocabProbe(offsets=1, layers=[1], loss="kl", form="head", epochs=12, lr=0.01),
        "lens": TunedLens(offsets=1, layers=[1], steps=600, batch=512, lr=1.0),
    }[kind]
    plain = type(probe)(**probe.get_params()).fit(tiny_cache)
    found = ControlProbe(probe, control).fit(tiny_cache)
    model = torch.from_numpy(tiny_cache.head.logits(tiny_cache.residual_array(2)[:])).log_softmax(
        -1
    )
    mean = model.exp()[rows_of(tiny_cache, 1) + 1].mean(0)
    constant = mean.log() if kind == "vocab" else best_constant(tiny_cache, mean)
    targets = rows_of(tiny_cache, 1, "test") + 1
    want = float((model.exp() * (model - constant))[targets].sum(-1).mean())
    kl = {
        row.probe: not_none(row.kl)
        for row in evaluate(tiny_cache, [plain, found], split="test").rows
    }
    assert kl[found.kind] == pytest.approx(want, rel=0.05)
    assert kl[plain.kind] < 0.9 * want
    again = type(found).restore(constructor_params(found), *found.state())
    row = evaluate(tiny_cache, [again], split="test").select(found.kind, 1)[0]
    assert row.kl == pytest.approx(kl[found.kind], rel=1e-6)


def constructor_params(probe: ControlProbe) -> dict:
    return save.constructor_params(ControlProbe, save.saved_params(probe))


@pytest.mark.parametrize("form", ["full", "head"])
def test_vocabulary_probes_gain_from_the_next_token(tiny_cache, form):
    given = {"offsets": 1, "layers": [1], "loss": "kl", "form": form, "epochs": 12, "lr": 0.01}
    plain = VocabProbe(**given).fit(tiny_cache)
    both = ControlProbe(VocabProbe(**given), "next-token").fit(tiny_cache)
    kl = {
        row.probe: not_none(row.kl)
        for row in evaluate(tiny_cache, [plain, both], split="test").rows
    }
    assert kl["vocab/next-token"] < 0.8 * kl["vocab"]


@pytest.mark.slow
@pytest.mark.long
def test_on_the_sample_model_controls_say_what_the_unigram_says(tmp_path):
    sample = residua.extract(str(MODEL_DIR), str(TEXT_PATH), root=tmp_path)
    layer = sample.n_blocks
    ridge = RidgeProbe(offsets=(1, 2), layers=[layer])
    vocab = VocabProbe(offsets=1, layers=[layer], loss="text", epochs=3, lr=1e-3)
    probes: list = [Unigram((1,)).fit(sample)]
    for control in ("shuffled", "permuted"):
        found = ControlProbe(ridge, control).fit(sample)
        for offset in (1, 2):
            assert abs(found.score(sample, layer=layer, offset=offset, split="test")) < 0.01
        probes.append(ControlProbe(vocab, control).fit(sample))
    found = evaluate(sample, [*probes, vocab.fit(sample)])
    nll = {row["probe"]: row["nll_text"] for row in found.to_dicts()}
    for control in ("shuffled", "permuted"):
        assert nll[f"vocab/{control}"] == pytest.approx(nll["unigram"], rel=0.05)
    assert nll["vocab"] < 0.9 * nll["unigram"]
