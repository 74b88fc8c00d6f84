"""Claims about what users give to probes: any dtype, any whole number; odd arrays are refused."""

# The parameters say int; what else is taken, and what is refused, is the subject here.
# pyright: reportArgumentType=false, reportFunctionMemberAccess=false
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import residua
from residua.analysis.evaluation.lens_heatmap import heatmap
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.errors import (
    InputTypeError,
    MismatchError,
    NotFoundError,
    ResiduaWarning,
    UsageError,
)
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.format.array import CacheArray
from residua.cache.number_ranges import as_tuple, as_whole_number, is_several
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.row_loader import RowLoader
from residua.cli import main
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import FutureLens, TunedLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ..support.synthetic import make_cache, random_head

WIDTH, VOCAB, LAYERS = 8, 20, 3


def cache_of(
    root: Path, lengths: list[int], ids: np.ndarray | None = None, seed: int = 0
) -> ActivationCache:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(sum(lengths), WIDTH)).astype(np.float32)]
    for _ in range(LAYERS - 1):
        layers.append(layers[-1] + 0.5 * rng.normal(size=layers[0].shape).astype(np.float32))
    return make_cache(root, layers, lengths, random_head(WIDTH, VOCAB, seed), ids)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    return cache_of(tmp_path_factory.mktemp("cache"), [10] * 60)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> ActivationCache:
    """A cache of the same shape whose head differs."""
    return cache_of(tmp_path_factory.mktemp("other"), [10] * 60, seed=1)


# Rows of other dtypes


def integer_rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(-5, 6, (400, 6))
    return x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)


DTYPES = ["int8", "int64", "uint8", "bool", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_probe_reads_rows_of_every_dtype_alike(dtype):
    x, y = integer_rows()
    probe = VocabProbe(epochs=20, batch=64).fit(x.astype(np.float32), y)
    rows = (x / 2 if "float" in dtype else np.abs(x)).astype(dtype)
    parameters = probe.map()
    logits = rows.astype(np.float64) @ parameters["weight"].double().numpy().T
    logits += parameters["bias"].double().numpy()
    likely = np.exp(logits - logits.max(-1, keepdims=True))
    likely /= likely.sum(-1, keepdims=True)
    lazy = da.from_array(rows, chunks=(100, 3))
    tensor = torch.from_numpy(rows)
    for given in (rows, lazy, tensor):
        found = np.asarray(probe.predict_proba(given))
        np.testing.assert_allclose(found, likely, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            np.asarray(probe.predict_log_proba(given)), np.log(likely), rtol=1e-5, atol=1e-5
        )
        assert np.array_equal(np.asarray(probe.predict(given)), likely.argmax(-1))
        assert probe.score(given, y) == np.mean(likely.argmax(-1) == y)
    assert probe.predict_proba(lazy).dtype == probe.predict_proba(lazy).compute().dtype == "float32"
    assert probe.predict(lazy).dtype == probe.predict(lazy).compute().dtype == probe.classes_.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_reads_rows_of_every_dtype_alike(dtype):
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    raw = 40 * rng.normal(size=(300, 5))
    x = (raw > 0 if dtype == "bool" else raw if "float" in dtype else np.abs(raw)).astype(dtype)
    y = (x.astype(np.float64) @ rng.normal(size=(5, 3)) + rng.normal(size=(300, 3)) + 300).astype(
        "f2"
    )
    model = Ridge(alpha=2.0).fit(x.astype(np.float64), y.astype(np.float64))
    want = model.predict(x.astype(np.float64))
    score = model.score(x.astype(np.float64), y.astype(np.float64))
    lazy, lazy_y = da.from_array(x, chunks=(70, 2)), da.from_array(y, chunks=(70, 3))
    for rows, targets in ((x, y), (lazy, lazy_y), (torch.from_numpy(x), torch.from_numpy(y))):
        probe = RidgeProbe(alpha=2.0).fit(rows, targets)
        np.testing.assert_allclose(probe.coef_, model.coef_, rtol=1e-6, atol=1e-9)
        for given in (x, lazy, torch.from_numpy(x)):
            np.testing.assert_allclose(np.asarray(probe.predict(given)), want, rtol=1e-6)
        # Squares of float16 targets overflow in float16.
        weighted = 1 - ((y - want) ** 2).sum() / ((y - y.mean(0, dtype="f8")) ** 2).sum(dtype="f8")
        assert probe.score(rows, targets) == pytest.approx(weighted, rel=1e-6)
    assert score > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_states_of_torch_in_other_dtypes_are_cast_to_the_parameters(cache, dtype):
    states = (3 * torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = states.to(torch.float32)
    head = cache.head.torch()
    tokens = torch.zeros(7, dtype=torch.int64)
    lens = TunedLens(layers=[1], steps=0).fit(cache)
    probes = [
        LogitLens((1,), (0,)),
        RidgeProbe(layers=[1], alpha=1.0).fit(cache, keep=False),
        lens,
        VocabProbe(layers=[1], epochs=1, batch=64, lr=0.01).fit(cache),
        VocabProbe(layers=[1], epochs=1, batch=64, lr=0.01, form="head").fit(cache),
        residua.ControlProbe(RidgeProbe(layers=[1], alpha=1.0), "permuted").fit(cache),
    ]
    for probe in probes:
        found = probe.logits(ReadoutBatch(states, tokens, head), 1, 0)
        want = probe.logits(ReadoutBatch(exact, tokens, head), 1, 0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    want = exact.double().numpy() @ lens.map(1).weight.astype("f8") + lens.map(1).bias
    np.testing.assert_allclose(lens.transform_hidden(states, 1).numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int16", "float16", "float64"])
def test_a_lens_translates_rows_of_every_dtype(cache, dtype):
    lens = TunedLens.of({(1, 0): AffineMap(*(np.random.default_rng(0).normal(size=s).astype("f4")
                                             for s in ((WIDTH, WIDTH), WIDTH)))})  # fmt: skip
    rows = (5 * np.random.default_rng(1).normal(size=(9, WIDTH))).astype(dtype)
    want = rows.astype("f8") @ lens.map(1).weight.astype("f8") + lens.map(1).bias
    for given in (rows, rows.tolist(), da.from_array(rows, chunks=(4, 3))):
        found = np.asarray(lens.transform_hidden(given, 1))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"expected rows \(\.\.\., 8\)"):
        lens.transform_hidden(rows[:, 1:], 1)


# Odd arrays


def arrays() -> tuple[np.ndarray, np.ndarray, Any, Any]:
    x = np.random.default_rng(0).normal(size=(300, 10))
    y = x[:, :2]
    return x, y, da.from_array(x, chunks=50), da.from_array(y, chunks=50)


def frames(x: np.ndarray) -> Any:
    import dask.dataframe as dd
    import pandas as pd

    return dd.from_pandas(pd.DataFrame(x), npartitions=2)


X, Y, LAZY, LAZY_Y = arrays()
LABELS = (X[:, 0] > 0).astype(int)
DAYS = np.array(["2020-01-01", "2021-01-01"], "M8[D]")[LABELS]
ODD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "masked": (lambda p: p(np.ma.masked_greater(X, 1)), "X has masked values: fill them"),
    "masked y": (lambda p: p(X, np.ma.masked_greater(LABELS, 0)), "y has masked values"),
    "dask masked": (lambda p: p(da.ma.masked_greater(LAZY, 1)), "dask array of masked blocks"),
    "dask frame": (lambda p: p(frames(X)), r"to_dask_array\(lengths=True\)"),
    "unknown chunks": (lambda p: p(LAZY[LAZY[:, 0] > 0]), r"X\.compute_chunk_sizes\(\)"),
    "complex": (lambda p: p(X + 1j), "Complex data not supported"),
    "dask complex": (lambda p: p(LAZY + 1j), "Complex data not supported"),
    "strings": (lambda p: p(X.astype(str)), "X must hold numbers, not <U"),
    "dask objects": (lambda p: p(LAZY.astype(object)), "X must hold numbers, not object"),
    "dates": (lambda p: p(np.broadcast_to(DAYS[:, None], X.shape)), "X must hold numbers, not dat"),
    "NaN": (lambda p: p(np.where(X > 1, np.nan, X)), "NaN"),
    "dask NaN": (lambda p: p(da.where(LAZY > 1, np.nan, LAZY)), "not finite"),
    "dask inf": (lambda p: p(da.where(LAZY > 1, np.inf, LAZY)), "not finite"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", ["ridge", "vocab"])
@pytest.mark.parametrize("name", list(ODD))
def test_odd_arrays_are_refused_with_what_to_do(kind, name):
    call, message = ODD[name]
    probe: Any = RidgeProbe(alpha=1.0) if kind == "ridge" else VocabProbe(epochs=1)

    def fit(x: Any, y: Any = None) -> Any:
        if y is None:
            y = LABELS if not hasattr(x, "dask") else da.from_array(LABELS, chunks=50)
        return probe.fit(x, y)

    with pytest.raises(UsageError, match=message):
        call(fit)


@pytest.mark.parametrize(
    "name", [name for name in ODD if name not in ("masked y", "unknown chunks")]
)
def test_odd_arrays_are_refused_by_a_fitted_probe(name):
    call, message = ODD[name]
    if name in ("NaN", "dask NaN", "dask inf"):
        message = "NaN|not finite"
    with pytest.raises(UsageError, match=message):
        call(lambda x: np.asarray(VocabProbe(epochs=1).fit(X, LABELS).predict(x)))
    if "dask NaN" not in name and "dask inf" not in name:  # ridge gives NaN for NaN
        with pytest.raises(UsageError, match=message):
            call(lambda x: np.asarray(RidgeProbe(alpha=1.0).fit(X, Y).predict(x)))


def test_arrays_that_hide_nothing_are_taken():
    shown = np.ma.masked_greater(X, 100)
    want = RidgeProbe(alpha=1.0).fit(X, Y).coef_
    assert np.array_equal(RidgeProbe(alpha=1.0).fit(shown, Y).coef_, want)
    # Rows that are only read may be of an unknown number.
    some = LAZY[LAZY[:, 0] > 0]
    probe = RidgeProbe(alpha=1.0).fit(X, Y)
    np.testing.assert_allclose(probe.predict(some).compute(), probe.predict(X[X[:, 0] > 0]))
    assert probe.score(some, LAZY_Y[LAZY[:, 0] > 0]) == pytest.approx(
        probe.score(X[X[:, 0] > 0], Y[X[:, 0] > 0])
    )


def test_score_needs_targets_that_fit():
    ridge, vocab = RidgeProbe(alpha=1.0).fit(X, Y), VocabProbe(epochs=1).fit(X, LABELS)
    with pytest.raises(UsageError, match=r"targets: score\(X, y\)"):
        ridge.score(X)
    with pytest.raises(UsageError, match=r"labels: score\(X, y\)"):
        vocab.score(X)
    with pytest.raises(UsageError, match=r"expected targets y \(300, 2\), found \(300,\)"):
        ridge.score(X, Y[:, 0])
    with pytest.raises(UsageError, match=r"y is missing"):
        vocab.fit(LAZY)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (DAYS, "y must hold numbers or strings, not datetime64"),
        (DAYS - DAYS[0], "y must hold numbers or strings, not timedelta64"),
        (LABELS.astype("S1"), "y must hold numbers or strings, not"),
        (DAYS.astype(object), "convert them, for example with y.astype"),
        (da.from_array(np.where(LABELS, np.nan, 1.0), chunks=50), "labels y must be finite"),
    ],
)
def test_labels_that_cannot_be_saved_are_refused_before_the_fit(labels, message):
    with pytest.raises(UsageError, match=message):
        VocabProbe(epochs=1).fit(LAZY if hasattr(labels, "dask") else X, labels)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "float32", "U3", "object"])
def test_labels_come_back_in_their_dtype(tmp_path, dtype):
    labels = LABELS.astype("U3").astype(object) if dtype == "object" else LABELS.astype(dtype)
    probe = VocabProbe(epochs=1).fit(X, labels)
    loaded = residua.load_probe(residua.save_probe(probe, tmp_path))
    assert loaded.classes_.dtype == probe.classes_.dtype == labels.dtype
    assert np.array_equal(loaded.predict(X), probe.predict(X))


# Numbers of numpy


def test_whole_numbers_are_taken_as_what_they_are():
    for given in (3, np.int64(3), np.uint8(3), np.array(3), [3], np.array([3]), {3}, range(3, 4)):
        found = as_tuple(given)
        assert found == (3,)
        assert type(found[0]) is int
    assert [is_several(v) for v in (3, np.array(3), np.int8(3), [3], np.array([3]))] == [
        False, False, False, True, True,
    ]  # fmt: skip
    for given in (True, np.True_, np.array([True, False]), 1.5, np.float64(2), "3", None, [[1]]):
        with pytest.raises(InputTypeError, match="layers must be a whole number or several"):
            as_tuple(given, "layers")
    with pytest.raises(InputTypeError, match="seed must be one whole number"):
        as_whole_number([1], "seed")


NUMPY: dict[str, Callable[[], Any]] = {
    "ridge": lambda: RidgeProbe(np.array([0, 1]), np.array([1, 2]), folds=np.int64(3)),
    "ridge of one target": lambda: RidgeProbe(np.int64(1), np.array([1]), target=np.array(2)),
    "ridge of several": lambda: RidgeProbe(np.array(1), np.int32(1), target=np.array([1, 2])),
    "lens": lambda: TunedLens(
        np.array([0, 1]), np.array([1]), np.float32(0.1), np.int64(2), np.int32(16),
        np.float64(0.1), np.uint8(1),
    ),
    "future": lambda: FutureLens(np.int64(1), layers=np.int64(1), steps=np.int64(2)),
    "vocab": lambda: VocabProbe(
        np.array([0, 1]), np.array([1]), lr=np.float32(0.01), epochs=np.int64(1),
        batch=np.int64(64), rank=np.int32(2), seed=np.int64(1), validation=np.float64(0.1),
    ),
    "unigram": lambda: residua.Unigram(np.array([0, 1])),
    "bigram": lambda: residua.Bigram(1),
    "lagged": lambda: residua.LaggedBigram(np.int64(1)),
    "chain": lambda: residua.BigramChain(np.array([0, 2])),
    "marginal": lambda: residua.MarginalBigram(np.array([1])),
    "trigram": lambda: residua.Trigram(np.array(1), contexts=np.int64(50)),
    "control": lambda: residua.ControlProbe(
        RidgeProbe(np.array([1]), np.array([1])), "shuffled", np.int64(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NUMPY))
def test_numbers_of_numpy_are_numbers_in_every_probe(cache, tmp_path, name):
    probe = NUMPY[name]()
    options: dict[str, Any] = {"keep": np.True_} if name.startswith("ridge") else {}
    if name in ("lens", "vocab"):
        options["checkpoint"] = tmp_path / "checkpoint"
    probe.fit(cache, **options)
    assert {type(v) for pair in probe.pairs() for v in pair} <= {int, type(None)}
    json.dumps(probe.metrics(), allow_nan=False)
    loaded = residua.load_probe(residua.save_probe(probe, tmp_path / "probe"))
    assert loaded.pairs() == probe.pairs()
    json.dumps(loaded.metrics(), allow_nan=False)
    if name != "ridge of several":
        rows = evaluate(cache, loaded, max_positions=np.int64(200), seed=np.int64(1)).to_dicts()
        assert {type(v) for row in rows for v in row.values()} <= {int, float, str, type(None)}


def test_moments_are_not_kept_where_numpys_false_says_so(tmp_path):
    cache = cache_of(tmp_path, [10] * 60)
    found = RidgeProbe().fit(cache, keep=np.False_).moments_
    assert (found["saved"], found["why"]) == (0, "not asked for")
    assert list((cache.path / "moments").iterdir()) == []


def test_evaluation_takes_one_of_each(cache):
    ridge = RidgeProbe(offsets=1, layers=1, alpha=1.0).fit(cache, keep=False)
    one = evaluate(cache, ridge, offsets=1, layers=np.int64(1)).to_dicts()
    assert one == evaluate(cache, [ridge], offsets=[1], layers=[1]).to_dicts()
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    found = evaluate(cache, LogitLens(np.array([1]), np.int64(0)), offsets=np.array([0]))
    assert found.layers == (1,)
    for layers in (np.array([True, False, True]), [1.5], "0-2"):
        with pytest.raises(InputTypeError, match="layers must be a whole number"):
            evaluate(cache, layers=layers)
    assert heatmap(cache, ridge, offset=np.int64(1), sequence=np.int64(0)).sequence == 0


def test_extraction_and_loading_take_numbers_of_numpy(cache, tmp_path):
    request = ExtractionRequest("m", "d", context=np.int64(8), layers=np.array([0, 2]),
                                seed=np.uint8(3),
                      pack=np.False_, max_tokens=np.int32(5))  # pyright: ignore  # fmt: skip
    plain = ExtractionRequest("m", "d", context=8, layers=(0, 2), seed=3, pack=False, max_tokens=5)
    assert request == plain
    fields = {name: value for name, value in vars(request).items() if name != "given"}
    json.dumps(fields)  # what is given in Python has no JSON
    with pytest.raises(InputTypeError, match="context must be a whole number"):
        ExtractionRequest("m", "d", context=8.5)  # pyright: ignore[reportArgumentType]
    loader = RowLoader(cache, np.int64(1), batch_rows=np.int64(64))  # pyright: ignore
    assert next(iter(loader)).shape == (64, WIDTH)  # pyright: ignore
    json.dumps(loader.state_dict())
    index = residua.export(cache, tmp_path / "out", layers=np.array([1]))
    assert list(index["layers"]) == ["1"]


# Offsets, layers and models that a probe lacks


def test_a_probe_of_another_model_is_refused_unless_forced(cache, other_model):
    probes: list[Any] = [
        RidgeProbe(layers=[1], alpha=1.0).fit(other_model, keep=False),
        TunedLens(layers=[1], steps=0).fit(other_model),
        VocabProbe(layers=[1], epochs=1, batch=64, lr=0.01).fit(other_model),
        residua.Unigram(0).fit(other_model),
        residua.ControlProbe(RidgeProbe(layers=[1], alpha=1.0)).fit(other_model),
    ]
    for probe in probes:
        with pytest.raises(MismatchError, match=f"{probe.kind}: .* use a cache of the same model"):
            evaluate(cache, [probe])
        row = evaluate(cache, [probe], force=True).select(probe.kind, 0)[0]
        assert row.kl is not None
    with pytest.raises(MismatchError, match="ridge: "):
        heatmap(cache, probes[0])
    assert heatmap(cache, probes[0], force=True).probe == "ridge"


def test_a_probe_of_another_width_or_vocabulary_is_refused_even_if_forced(cache):
    x = np.random.default_rng(0).normal(size=(200, WIDTH + 1))
    wide = RidgeProbe(alpha=1.0).fit(x, x)
    with pytest.raises(MismatchError, match="width 9, this cache has width 8"):
        evaluate(cache, wide, force=True)
    labels = VocabProbe(epochs=1).fit(x[:, 1:], (x[:, 0] > 0).astype(int))
    with pytest.raises(MismatchError, match="2 classes that are not the 20 tokens"):
        evaluate(cache, labels, force=True)

    class Narrow(LogitLens):
        kind = "narrow"

        def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
            return super().logits(batch, layer, offset)[:, :-1]

    with pytest.raises(MismatchError, match=r"narrow gives logits of shape \(\d+, 19\)"):
        evaluate(cache, Narrow((1,), (0,)))


def test_what_no_probe_was_fitted_for_is_named_with_what_there_is(cache):
    ridge = RidgeProbe(offsets=[0, 1], layers=[1, 2], alpha=1.0).fit(cache, keep=False)
    lens = TunedLens(layers=[1], steps=0).fit(cache)
    with pytest.raises(NotFoundError, match="for offset 5: ridge has layers 1-2, offsets 0-1"):
        evaluate(cache, ridge, offsets=[0, 5])
    with pytest.raises(NotFoundError, match="ridge was fitted for none of the pairs asked for"):
        evaluate(cache, ridge, layers=[0])
    with pytest.raises(
        NotFoundError, match="lens was fitted for none .* it has layers 1, offsets 0"
    ):
        evaluate(cache, [ridge, lens], offsets=[1])
    found = evaluate(cache, [ridge, lens], offsets=[0, 1])
    assert "lens was not fitted for offset 1: no row there" in found.notes
    assert [row.offset for row in found.rows if row.probe == "lens"] == [0]
    found = evaluate(cache, ridge, layers=[0, 1], offsets=0)
    assert "ridge was not fitted for layer 0: no row there" in found.notes
    assert [row.layer for row in found.rows] == [0, 1, 1]
    # A baseline is a floor where it says something.
    bigram = residua.Bigram(1).fit(cache)
    found = evaluate(cache, [ridge, bigram], offsets=[0])
    assert "bigram was not fitted for offset 0: no row there" in found.notes
    found = evaluate(cache, bigram, offsets=[0, 1])
    assert "bigram was not fitted for offset 0: no row there" in found.notes
    assert [row.offset for row in found.rows if row.probe == "bigram"] == [1]
    with pytest.raises(
        NotFoundError, match="reads no layer at offset 3: it reads layers at offsets 0"
    ):
        heatmap(cache, lens, offset=3)
    with pytest.raises(NotFoundError, match="it reads no layer at all"):
        heatmap(cache, bigram, offset=1)
    lagged = residua.LaggedBigram(1).fit(cache)
    with pytest.raises(NotFoundError, match="no counts for offset 2; it has the offsets 1"):
        lagged.logits(
            ReadoutBatch(None, torch.zeros(1, dtype=torch.int64), cache.head.torch()), None, 2
        )


@pytest.mark.parametrize("control", ["shuffled", "permuted", "next-token"])
def test_a_heatmap_of_a_control_is_what_it_reads(cache, control):
    probe = residua.ControlProbe(RidgeProbe(1, [0, 1], alpha=1.0), control).fit(cache)
    found = heatmap(cache, probe, offset=1, split="train", width=5)
    start = int(cache.sequence_start[found.sequence])
    rows, view = np.arange(start, start + 5), probe.view(cache)
    model = cache.head.logits(cache.residual_array(cache.n_blocks)[rows + 1])
    log_p = torch.from_numpy(model).double().log_softmax(-1).numpy()
    for place, layer in enumerate(found.layers):
        predicted = view.residual_array(layer).take(rows) @ probe.probe_.map(layer, 1).weight
        predicted += probe.probe_.map(layer, 1).bias
        log_q = torch.from_numpy(cache.head.logits(predicted[:, :WIDTH])).double().log_softmax(-1)
        log_q = log_q.numpy()
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(found.kl[place], kl, rtol=1e-4, atol=1e-5)
        best = np.exp(log_q.max(-1))
        np.testing.assert_allclose(found.probability[place, :, 0], best, rtol=1e-4)


# Offsets that the validation split lacks


@pytest.fixture(scope="module")
def short_validation(tmp_path_factory) -> ActivationCache:
    """A cache whose validation sequences all have two tokens: none has a pair at offset 3."""
    cache = cache_of(tmp_path_factory.mktemp("short"), [2] * 4 + [20] * 10)
    cache.sequence_split = np.array([1] * 4 + [0] * 9 + [2], np.uint8)
    return cache


@pytest.mark.parametrize("kind", ["lens", "vocab", "lens control", "vocab control"])
def test_an_offset_without_a_validation_pair_is_fitted_unvalidated(
    short_validation, tmp_path, kind
):
    probe: Any = TunedLens([0, 3], [1, 2], steps=5, batch=16)
    if kind.startswith("vocab"):
        probe = VocabProbe([0, 3], [1, 2], epochs=1, batch=16)
    if kind.endswith("control"):
        probe = residua.ControlProbe(probe)
    options = {"checkpoint": tmp_path / "checkpoint"}
    if kind.startswith("vocab"):
        options["checkpoint_seconds"] = 0.0
    with pytest.warns(ResiduaWarning, match="layers 1-2 at offset 3 .* fitted unvalidated") as said:
        probe.fit(short_validation, **options)
    assert len(said) == 1
    loaded = residua.load_probe(residua.save_probe(probe, tmp_path / "probe"))
    assert loaded.pairs() == [(1, 0), (1, 3), (2, 0), (2, 3)]
    loss = "validation" if kind.startswith("vocab") else "kl"
    for row in json.loads(json.dumps(loaded.metrics(), allow_nan=False)):
        lens_of_the_model = kind == "lens" and (row["layer"], row["offset"]) == (2, 0)
        assert (row[loss] is None) == (row["offset"] == 3)
        if kind == "lens" and not lens_of_the_model:
            assert (row["n_validation"] > 0) == (row["offset"] == 0)
            assert row["offset"] == 0 or (row["start"], row["steps"]) == ("ridge", 5)
    evaluated = evaluate(short_validation, loaded, split="train", offsets=3)
    ours = [row for row in evaluated.rows if row.probe == loaded.kind]
    assert all(row.kl is not None and np.isfinite(row.kl) for row in ours)


def test_an_unvalidated_lens_without_steps_is_ridge(short_validation):
    with pytest.warns(ResiduaWarning, match="fitted unvalidated"):
        lens = TunedLens(3, [1], steps=0).fit(short_validation)
    ridge = RidgeProbe(3, [1]).fit(short_validation, keep=False)
    np.testing.assert_allclose(lens.map(1).weight, ridge.map(1, 3).weight, rtol=1e-3, atol=1e-4)
    assert not np.allclose(lens.map(1).weight, np.eye(WIDTH))


def test_other_fits_do_not_change_an_unvalidated_one(short_validation):
    options: dict[str, Any] = {"layers": [1], "steps": 12, "batch": 16}
    with pytest.warns(ResiduaWarning, match="fitted unvalidated"):
        alone = TunedLens(3, **options).fit(short_validation)
    with pytest.warns(ResiduaWarning, match="fitted unvalidated"):
        both = TunedLens([0, 3], **options).fit(short_validation)
    np.testing.assert_allclose(alone.map(1).weight, both.map(1, 3).weight, rtol=1e-3, atol=1e-4)
    ridge = RidgeProbe(3, [1]).fit(short_validation, keep=False)
    assert not np.allclose(alone.map(1).weight, ridge.map(1, 3).weight, atol=1e-3)


@pytest.mark.parametrize("kind", ["ridge", "lens", "vocab"])
def test_an_offset_without_a_pair_is_refused_before_a_row_is_read(cache, monkeypatch, kind):
    read_shard = CacheArray.shard

    def refuse_residual(array, shard):
        assert array.path.parent.name != "residual", f"layer {array.path.name} was read"
        return read_shard(array, shard)

    offsets = range(401)
    probes: dict[str, Any] = {
        "ridge": RidgeProbe(offsets, layers=[1], target=2),
        "lens": TunedLens(offsets, layers=[1]),
        "vocab": VocabProbe(offsets, layers=[1]),
    }
    monkeypatch.setattr(CacheArray, "shard", refuse_residual)
    cache = ActivationCache(cache.path)
    expected = "the train split has no pair at offsets 10-400: .* the largest offset is 9; use"
    with pytest.raises(UsageError, match=expected):
        probes[kind].fit(cache)


def test_offsets_without_a_pair_are_named_by_an_evaluation(cache):
    evaluation = evaluate(cache, [], split="test", offsets=[0, 9, *range(10, 13)])
    assert evaluation.offsets == (0, 9)
    assert set(evaluation.crossing) == {0, 9}
    expected = "offsets 10-12 have no pair in the measured test sequences and no row; the largest"
    assert any(note.startswith(expected) for note in evaluation.notes)


def test_a_split_without_a_pair_has_no_score(short_validation):
    with pytest.warns(ResiduaWarning, match="fitted unvalidated"):
        vocab = VocabProbe(3, [1], epochs=1, batch=16, lr=0.01).fit(short_validation)
    ridge = RidgeProbe(3, [1]).fit(short_validation, keep=False)
    for probe in (vocab, ridge):
        with pytest.raises(UsageError, match="split 'validation' has no pair at offset 3"):
            probe.score(short_validation)


def test_a_cache_without_a_validation_split_is_fitted_unvalidated(tmp_path):
    bare = cache_of(tmp_path, [20] * 10)
    bare.sequence_split = np.array([0] * 9 + [2], np.uint8)
    for probe in (TunedLens(0, [1], steps=2, batch=16), VocabProbe(0, [1], epochs=1, batch=16)):
        with pytest.warns(ResiduaWarning, match="layers 1 at offset 0 .* fitted unvalidated"):
            probe.fit(bare)
    assert TunedLens(0, [2], steps=2).fit(bare).metrics()[0]["kl"] == 0


def test_the_command_line_names_what_a_probe_has(cache, tmp_path):
    probe = RidgeProbe(layers=[1], alpha=1.0).fit(cache, keep=False)
    folder = residua.save_probe(probe, tmp_path / "ridge")
    for option, wanted in (("--offsets", "2"), ("--layers", "0")):
        call = ["evaluate", str(cache.path), str(folder), option, wanted, "--json"]
        result = CliRunner().invoke(main, call)
        assert result.exit_code == 2
        said = json.loads(result.stdout)
        assert said["error"] == "NotFoundError"
        assert "it has layers 1, offsets 0" in said["message"]


@pytest.mark.parametrize("huge", [1 << 62, 10**23])
def test_huge_numbers_are_answered_and_no_failure_of_int64(cache, huge):
    for probe in (RidgeProbe(huge), TunedLens(huge), VocabProbe(huge), RidgeProbe(layers=[huge])):
        with pytest.raises(UsageError):
            probe.fit(cache)
    with pytest.raises(UsageError, match="folds must be at least 1 and at most"):
        RidgeProbe(folds=huge).fit(cache)
    for options in ({"drop_first": huge}, {"offsets": huge}):
        with pytest.raises(UsageError):
            evaluate(cache, [], **options)
    lagged = residua.LaggedBigram([0, min(huge, 1 << 61)]).fit(cache)
    evaluation = evaluate(cache, lagged, split="train")
    assert evaluation.offsets == (0,)
