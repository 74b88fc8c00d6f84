"""Readings of lenses at sampled positions are those of plain float64 numpy, however blocks fall."""

from pathlib import Path

import numpy as np
import pytest

from residua.analysis.studies.trajectories import readings as readings_file
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.analysis.studies.trajectories.readings import MEASURES, measure_trajectories
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.lens.logit_lens import LogitLens

from ....support.synthetic import make_cache, random_head

VOCAB, WIDTH = 37, 8


def cache_of(root: Path, spoil: bool = False) -> ActivationCache:
    rng = np.random.default_rng(3)
    lengths = [40, 25, 1, 30]
    layers = [rng.normal(0, 1 + layer, (sum(lengths), WIDTH)) for layer in range(4)]
    if spoil:
        layers[1][7] = np.nan
        layers[3][50] = np.inf
    documents = np.repeat([0, 1, 2, 3, 4], [20, 20, 25, 1, 30])
    return make_cache(root, layers, lengths, random_head(WIDTH, VOCAB), documents=documents)


def plain_measures(
    cache: ActivationCache, layer: int, positions: np.ndarray, text: np.ndarray, tracked: int
) -> dict[str, np.ndarray]:
    """All measures of the logit lens at `layer`, one position at a time in float64."""

    def log_softmax(number: int, position: int) -> np.ndarray:
        logits = cache.head.logits(cache.residual_array(number)[np.array([position])])[0]
        logits = logits.astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    found: dict[str, list[float]] = {}
    for position, token in zip(positions.tolist(), text.tolist(), strict=True):
        with np.errstate(all="ignore"):
            log_p, log_q = log_softmax(cache.n_blocks, position), log_softmax(layer, position)
            p, q = np.exp(log_p), np.exp(log_q)
            middle = np.log((p + q) / 2)
            values = {
                "entropy": -(q * log_q).sum(),
                "kl": (p * (log_p - log_q)).sum(),
                "js": ((p * (log_p - middle)).sum() + (q * (log_q - middle)).sum()) / 2,
                "total_variation": abs(p - q).sum() / 2,
                "cross_entropy": -log_q[token] if token >= 0 else np.nan,
                "max_probability": q.max(),
                "rank": 1.0 + (q > q[p.argmax()]).sum(),
                "text_rank": 1.0 + (q > q[token]).sum() if token >= 0 else np.nan,
                "log_p_final": log_q[p.argmax()],
                "surprisal": -log_p[q.argmax()],
                "tracked_log_p": log_q[tracked],
                "tracked_rank": 1.0 + (q > q[tracked]).sum(),
                "top": float(q.argmax()),
            }
        p_known, q_known = np.isfinite(p).all(), np.isfinite(q).all()
        of_lens = ("entropy", "max_probability", "cross_entropy", "text_rank", "top")
        for name, value in values.items():
            is_known = q_known and (p_known or name.startswith("tracked") or name in of_lens)
            found.setdefault(name, []).append(float(value) if is_known else np.nan)
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("spoil", [False, True])
def test_every_measure_is_that_of_plain_numpy(
    tmp_path: Path, rows: int, spoil: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, spoil)
    monkeypatch.setattr(readings_file, "default_window_rows", lambda *_: rows)
    sample = choose_positions(cache, "all", seed=1)
    assert sample.count == cache.positions
    assert (sample.text_tokens < 0).sum() == 5
    found = measure_trajectories(
        sample,
        {"logit": LogitLens.of(cache, 0)},
        tracked=5,
        marginals=True,
        device="cpu",
        progress=None,
    )["logit"]
    assert found.layers == (0, 1, 2, 3)
    assert set(found.values) == {*MEASURES, "tracked_log_p", "tracked_rank"}
    for layer in found.layers:
        plain = plain_measures(cache, layer, sample.positions, sample.text_tokens, 5)
        top = np.where(np.isnan(plain.pop("top")), -1, plain.get("top", 0))
        for name, values in plain.items():
            own = found.values[name][:, found.column(layer)]
            np.testing.assert_allclose(own, values, rtol=2e-4, atol=2e-5, err_msg=name)
        assert (top == -1).sum() == (found.top[:, found.column(layer)] == -1).sum()
    logits = cache.head.logits(cache.residual_array(2)[sample.positions]).astype(np.float64)
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    known = ~np.isnan(found.values["kl"][:, 2])
    assert found.marginal is not None
    np.testing.assert_allclose(found.marginal[2], q[known].mean(0), atol=1e-6)
    assert found.undefined == (2 if spoil else 0)
    if not spoil:
        assert np.abs(found.values["kl"][:, -1]).max() < 1e-6


def test_means_leave_undefined_values_out_and_resample_documents(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    sample = choose_positions(cache, "all")
    values = np.arange(sample.count, dtype=np.float64)
    values[3] = np.nan
    mean, (low, high) = sample.mean(values)
    assert mean == pytest.approx(np.nanmean(values))
    assert low is not None
    assert high is not None
    assert low < np.nanmean(values) < high
    assert sample.mean(np.full(sample.count, np.nan)) == (None, (None, None))
    constant = sample.mean(np.full(sample.count, 2.0))
    assert constant == (2.0, (2.0, 2.0))


def test_a_mask_takes_positions_and_their_documents(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    where = np.zeros(cache.positions, bool)
    where[[0, 21, 64, 70]] = True
    sample = choose_positions(cache, "all", where=where)
    assert sample.positions.tolist() == [0, 21, 64, 70]
    assert sample.sequence_numbers.tolist() == [0, 0, 1, 3]
    assert len(set(sample.unit_numbers.tolist())) == 4
    with pytest.raises(UsageError, match="no position"):
        choose_positions(cache, "all", where=np.zeros(cache.positions, bool))


def test_wrong_measures_layers_and_tokens_are_refused(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    sample, lens = choose_positions(cache, "all"), {"logit": LogitLens.of(cache, 0)}
    with pytest.raises(UsageError, match="no measure 'speed'"):
        measure_trajectories(sample, lens, measures=["speed"], progress=None)
    with pytest.raises(NotFoundError, match="reads none of the layers"):
        measure_trajectories(sample, lens, layers=9, progress=None)
    with pytest.raises(UsageError, match="no token 99"):
        measure_trajectories(sample, lens, tracked=99, progress=None)
    some = measure_trajectories(sample, lens, measures=["kl"], layers=[1], progress=None)["logit"]
    assert some.layers == (1, 3)
    assert set(some.values) == {"kl"}
    with pytest.raises(NotFoundError, match="does not read layer 2"):
        some.column(2)
