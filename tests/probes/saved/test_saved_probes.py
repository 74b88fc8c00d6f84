"""A loaded probe is the saved one in every respect: values, dtypes, memory order, parameters."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

import residua
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.baselines.marginal_bigram import BigramChain, MarginalBigram
from residua.probes.baselines.ngrams import Bigram, LaggedBigram, Trigram, Unigram
from residua.probes.basis.causal_basis import CausalBasis
from residua.probes.controls.control_probe import ControlProbe
from residua.probes.lens.logit_lens import LogitLens
from residua.probes.lens.tuned_lens import FutureLens, TunedLens
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.saved.kinds import KINDS
from residua.probes.saved.save import load_probe, save_probe
from residua.probes.vocabulary.mlp_probe import MlpProbe
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.evaluations import assert_same_rows
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 10, 24
NOT_SAVED = {"_device_copies", "_trainers", "_transition_parts", "head_", "folder_"}
"""Attributes that are made again from others; the head is the cache's, `geometry_` names it, and
`folder_` is where the probe was loaded from."""
STEPS: dict[str, Any] = {"steps": 10, "batch": 128, "lr": 0.1}
EPOCHS: dict[str, Any] = {"epochs": 1, "batch": 128, "lr": 0.05}
PROBES: dict[str, Any] = {
    "ridge": RidgeProbe((0, 1), layers=range(1), folds=3),
    "ridge to targets": RidgeProbe(cast(int, np.int64(1)), layers=[0], target=(1, 2)),
    "ridge of given penalties": RidgeProbe(layers=(0, 1), alphas=np.logspace(0, 3, 4), folds=2),
    "ridge of one penalty": RidgeProbe(range(0, 3, 2), alpha=3.0, folds=1),
    "lens": TunedLens(layers=range(0, 3, 2), **STEPS),
    "future": FutureLens((0, 1), layers=[0], **STEPS),
    "vocab": VocabProbe((0, 2), [0], **EPOCHS),
    "vocab of low rank": VocabProbe(1, [0, 1], rank=3, **EPOCHS),
    "vocab through the head": VocabProbe(1, [1], form="head", loss="kl", **EPOCHS),
    "vocab with a sweep": VocabProbe(1, [1], epochs=1, batch=128),
    "mlp": MlpProbe((0, 2), [0], hidden=4, **EPOCHS),
    "unigram": Unigram((0, 2)),
    "bigram": Bigram([1, 2]),  # pyright: ignore[reportArgumentType]
    "lagged": LaggedBigram((0, 1)),
    "trigram": Trigram((1,), contexts=20),
    "chain": BigramChain((0, 1)),
    "marginal": MarginalBigram((1,)),
    "shuffled ridge": ControlProbe(RidgeProbe((0, 1), layers=(0,)), "shuffled", seed=3),
    "permuted vocab": ControlProbe(VocabProbe(1, [0], **EPOCHS), "permuted"),
    "next-token mlp": ControlProbe(MlpProbe(1, [0], hidden=3, **EPOCHS), "next-token"),
    "next-token lens": ControlProbe(TunedLens(1, (0,), **STEPS), "next-token"),
    "basis": CausalBasis(2, layers=(0, 2), method="one-shot", positions=200),
}
READOUTS = [name for name in PROBES if name != "basis"]


def fit_on(mixed: ActivationCache, name: str) -> Any:
    """The probe `name`, fitted; a causal basis of the logit lens."""
    arguments = (LogitLens.of(mixed, 0),) if name == "basis" else ()
    return PROBES[name].fit(mixed, *arguments)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 40, 80).tolist()
    layers = [rng.normal(size=(sum(lengths), WIDTH)).astype("f4") for _ in range(3)]
    layers[2] += np.tanh(layers[0] @ rng.normal(size=(WIDTH, WIDTH)))
    return make_cache(tmp_path_factory.mktemp("mixed"), layers, lengths, random_head(WIDTH, VOCAB))


def differences(one: Any, other: Any, name: str = "probe") -> list[str]:
    """In which attributes, of any depth, two objects differ."""
    if type(one) is not type(other):
        return [f"{name}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, np.ndarray):
        flags = [(a.dtype, a.shape, a.strides, a.flags.writeable) for a in (one, other)]
        if flags[0] != flags[1]:
            return [f"{name}: {flags[0]} and {flags[1]}"]
        same = (
            one.tolist() == other.tolist()
            if one.dtype == object
            else one.tobytes() == other.tobytes()
        )
        return [] if same else [f"{name}: other values"]
    if isinstance(one, torch.Tensor):
        strides = [] if one.stride() == other.stride() else [f"{name}: other strides"]
        return strides + differences(one.numpy(), other.numpy(), name)
    if isinstance(one, csr_matrix):
        parts = ("data", "indices", "indptr", "shape")
        pairs = [(getattr(one, p), getattr(other, p), f"{name}.{p}") for p in parts]
    elif isinstance(one, dict):
        if set(one) != set(other):
            return [f"{name}: {set(one) ^ set(other)} only in one of both"]
        pairs = [(one[key], other[key], f"{name}[{key!r}]") for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{name}: other lengths"]
        pairs = [(a, b, f"{name}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif is_dataclass(one):
        names = [field.name for field in fields(one)]
        pairs = [(getattr(one, n), getattr(other, n), f"{name}.{n}") for n in names]
    elif hasattr(one, "get_params"):
        mine, theirs = (
            {k: v for k, v in vars(p).items() if k not in NOT_SAVED} for p in (one, other)
        )
        return differences(mine, theirs, name)
    else:
        same = one == other or (one != one and other != other)
        return [] if same else [f"{name}: {one!r} and {other!r}"]
    return [found for pair in pairs for found in differences(*pair)]


def test_every_kind_of_probe_is_among_them() -> None:
    kinds = {type(getattr(p, "probe", p)).kind for p in PROBES.values()}
    # Those that need a model are saved in tests of their own.
    assert kinds | {"jacobian", "prompt"} == set(KINDS)


@pytest.mark.parametrize("name", PROBES)
def test_a_loaded_probe_of_a_cache_is_the_saved_one(
    mixed: ActivationCache, tmp_path: Path, name: str
) -> None:
    probe = fit_on(mixed, name)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    assert not differences(probe, loaded)
    assert repr(loaded) == repr(probe)
    again = load_probe(save_probe(loaded, tmp_path / "again"))
    assert not differences(probe, again)


@pytest.mark.parametrize("name", READOUTS)
def test_a_loaded_probe_is_evaluated_alike(
    mixed: ActivationCache, tmp_path: Path, name: str
) -> None:
    probe = fit_on(mixed, name)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    options: dict[str, Any] = {"split": "train", "max_positions": 300}
    found, want = (residua.evaluate(mixed, [p], **options) for p in (loaded, probe))
    assert_same_rows(found, want)


@pytest.mark.parametrize("labels", ["i4", "u1", "f4", "bool", "U3", "O"])
def test_a_loaded_probe_of_labelled_rows_is_the_saved_one(tmp_path: Path, labels: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(150, 4))
    y = (
        np.array(["no", "yes"], "O")[(x[:, 0] > 0).astype(int)]
        if labels in ("U3", "O")
        else x[:, 0] > 0
    )
    probe = VocabProbe(**EPOCHS).fit(x, y.astype(labels))
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    assert not differences(probe, loaded)
    assert loaded.predict(x).dtype == y.astype(labels).dtype
    # A stream of rows goes on at the learning rate that it had reached.
    probe = VocabProbe(**EPOCHS).partial_fit(
        x, y.astype(labels), classes=np.unique(y.astype(labels))
    )
    loaded = load_probe(save_probe(probe, tmp_path / "partial"))
    assert not differences(probe, loaded)
    assert (loaded.steps_, loaded.passes_) == (probe.steps_, 1)
    assert probe.steps_ > 0


@pytest.mark.parametrize("targets", [None, 1, 3])
def test_a_loaded_probe_of_rows_is_the_saved_one(tmp_path: Path, targets: int | None) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, targets) if targets else 40)
    probe = RidgeProbe(alphas=[0.1, 1.0]).fit(x, y)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    assert not differences(probe, loaded)
    assert loaded.coef_.shape == ((5,) if targets is None else (targets, 5))


@pytest.mark.parametrize("kind", [RidgeProbe, VocabProbe])
def test_a_loaded_probe_of_a_data_frame_knows_its_columns(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(3)
    x = pd.DataFrame(rng.normal(size=(60, 3)), columns=["a", "b", "c"])
    probe = kind().fit(x, np.arange(60) % 2)
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    assert not differences(probe, loaded)
    assert loaded.feature_names_in_.tolist() == ["a", "b", "c"]
    loaded.predict(x)  # without the warning that columns have names
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(x[["c", "b", "a"]])


def test_maps_lie_row_by_row_whatever_order_they_come_in(mixed: ActivationCache) -> None:
    """Else a file, which keeps one order, gives another product in its last bits."""
    columns = AffineMap(np.asfortranarray(np.ones((3, 4))), np.ones(8)[::2])
    probes = [PROBES["ridge"].fit(mixed), PROBES["lens"].fit(mixed)]
    maps = [columns, *(found for probe in probes for found in probe.maps_.values())]
    for found in maps:
        assert found.weight.flags.c_contiguous
        assert found.bias.flags.c_contiguous


def test_parameters_that_the_first_version_wrote_are_read(
    tmp_path: Path, mixed: ActivationCache
) -> None:
    """Its files say no types, no labels' dtype and no steps."""
    from residua.cache.files.json_files import read_json, write_json

    new = ("param_types", "moments", "of_rows", "feature_names", "classes_dtype", "steps", "passes")
    for name in ("ridge", "vocab", "bigram"):
        probe = PROBES[name].fit(mixed)
        folder = save_probe(probe, tmp_path / name)
        config = {k: v for k, v in read_json(folder / "config.json").items() if k not in new}
        write_json(folder / "config.json", config)
        loaded = load_probe(folder)
        assert loaded.pairs() == probe.pairs()
        assert loaded.metrics() == probe.metrics()
        assert list(loaded.offsets if name == "bigram" else loaded.layers) == list(
            probe.offsets if name == "bigram" else probe.layers
        )
