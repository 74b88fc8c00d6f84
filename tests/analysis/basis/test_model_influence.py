"""Influences in the model are those of a plain forward pass with a hook, summed in numpy."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import residua
from residua.analysis.basis.influence_sample import InfluenceSample
from residua.analysis.basis.model_influence import (
    ModelInfluence,
    measure_model_influence,
    rank_correlation,
    span_sizes,
)
from residua.analysis.basis.stimulus_response import StimulusPoints
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.extraction.model_reload import load_model_of
from residua.cache.model.block_search import find_blocks
from residua.cache.model.blocks import DecoderBlocks
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.sequence_draw import draw_sequences
from residua.probes.base.resampling import ResamplingUnits, bootstrap_interval, resampling_counts
from residua.probes.basis.layer_basis import LayerBasis
from residua.probes.ridge.solver import AffineMap

from ...support import models
from ...support.models import save_model

K = 5
POSITIONS = 300
TOLERANCE = 2e-6
"""Largest difference in nats, or in a cosine: the model and its head compute in float32."""


@pytest.fixture(scope="module")
def blocks(tiny_cache: ActivationCache) -> DecoderBlocks:
    return load_model_of(tiny_cache)


@pytest.fixture(scope="module")
def ragged(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache of documents of different lengths, one per sequence, in full precision."""
    root = tmp_path_factory.mktemp("ragged")
    path = root / "texts.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in models.texts(80, seed=4)]
    path.write_text("".join(lines))
    return residua.extract(
        str(model_folder), str(path), root=root, context=64, pack=False, dtype="float32"
    )


def random_basis(cache: ActivationCache, layer: int, k: int = K, seed: int = 0) -> LayerBasis:
    """An oblique basis of the layer, with its mean as the reference."""
    rng = np.random.default_rng([seed, layer])
    rows = cache.residual_array(layer)[:]
    encoder = rng.normal(size=(k, cache.d_model))
    decoder = encoder + 0.3 * rng.normal(size=(k, cache.d_model))
    decoder = np.linalg.solve(encoder @ decoder.T, decoder)  # encoder decoder' = 1
    return LayerBasis(encoder, decoder, rows.mean(0))


def random_map(cache: ActivationCache, layer: int) -> AffineMap:
    rng = np.random.default_rng([9, layer])
    d = cache.d_model
    return AffineMap(np.eye(d) + 0.1 * rng.normal(size=(d, d)), 0.1 * rng.normal(size=d))


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    result: Any = stats.spearmanr(x, y)
    return float(result.statistic)


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def hooked_log_probs(
    blocks: DecoderBlocks, layer: int, rows: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """The model's log-probabilities when `rows` are its layer, by a hook; one sequence alone."""
    hidden = torch.from_numpy(rows.astype(np.float32))[None]
    model: Any = blocks.model
    if layer == 0:
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: hidden)
    else:

        def overwrite(_: Any, __: Any, output: Any) -> Any:
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = blocks.blocks[layer - 1].register_forward_hook(overwrite)
    try:
        with torch.inference_mode():
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            return log_softmax(model(input_ids=tokens, use_cache=False).logits[0].numpy())
    finally:
        handle.remove()


def ablated(rows: np.ndarray, basis: LayerBasis, directions: Any, reference: Any) -> np.ndarray:
    """Rows with the coordinates `directions` set to those of `reference`, in float64."""
    encoder, decoder = (a.astype(np.float64)[directions] for a in (basis.encoder, basis.decoder))
    return rows - (rows - reference) @ encoder.T @ decoder


def drawn_sequences(cache: ActivationCache) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and token ids of each sequence that is drawn."""
    for number in draw_sequences(cache, cache.sequences("test"), POSITIONS, 0):
        positions = cache.positions_of(np.array([number]))
        yield positions, cache.tokens.take(positions)


def plain_influence(
    cache: ActivationCache,
    blocks: DecoderBlocks,
    layer: int,
    basis: LayerBasis,
    directions: Any,
    affine: AffineMap | None = None,
    drop_first: int = 0,
) -> np.ndarray:
    """KL of each counted position, sequence by sequence: of the model, or of the lens `affine`."""
    values = []
    for positions, ids in drawn_sequences(cache):
        rows = cache.residual_array(layer).take(positions).astype(np.float64)
        changed = rows.copy()
        changed[drop_first:] = ablated(rows[drop_first:], basis, directions, basis.reference)
        if affine is None:
            clean, after = (
                hooked_log_probs(blocks, layer, state, ids) for state in (rows, changed)
            )
        else:
            clean, after = (
                log_softmax(cache.head.logits(affine(state).astype(np.float32)))
                for state in (rows, changed)
            )
        values.append(kl(clean, after)[drop_first:])
    return np.concatenate(values)


def measure(
    cache: ActivationCache, blocks: DecoderBlocks, layers: list[int], **options: Any
) -> dict[int, ModelInfluence]:
    bases = {layer: random_basis(cache, layer) for layer in layers}
    maps = {layer: random_map(cache, layer) for layer in layers}
    options = {"positions": POSITIONS, "alignment_positions": 24, **options}
    return measure_model_influence(cache, bases, maps, blocks, **options)


@pytest.mark.parametrize("drop_first", [0, 3])
@pytest.mark.parametrize("name", ["tiny_cache", "ragged"])
def test_influences_are_those_of_a_plain_forward_pass(
    name: str, drop_first: int, blocks: DecoderBlocks, request: pytest.FixtureRequest
) -> None:
    cache: ActivationCache = request.getfixturevalue(name)
    layers = [0, 2, 3]
    control = {layer: random_basis(cache, layer, k=3, seed=7) for layer in layers}
    results = measure(cache, blocks, layers, controls={"other": control}, drop_first=drop_first)
    assert list(results) == layers
    for layer, result in results.items():
        basis, affine = random_basis(cache, layer), random_map(cache, layer)

        def plain(
            basis: LayerBasis, directions: Any, lens: AffineMap | None, layer: int = layer
        ) -> np.ndarray:
            return plain_influence(cache, blocks, layer, basis, directions, lens, drop_first)

        for number in range(K):
            model, lens = (plain(basis, [number], lens) for lens in (None, affine))
            assert len(model) == result.n
            assert result.model_influences[number] == pytest.approx(model.mean(), abs=TOLERANCE)
            assert result.lens_influences[number] == pytest.approx(lens.mean(), abs=TOLERANCE)
            assert model.mean() > 100 * TOLERANCE
        assert list(result.model_span) == list(result.lens_span) == [1, 2, 4, 5]
        for size in result.model_span:
            model, lens = (plain(basis, slice(size), lens) for lens in (None, affine))
            assert result.model_span[size]["kl"] == pytest.approx(model.mean(), abs=TOLERANCE)
            assert result.lens_span[size]["kl"] == pytest.approx(lens.mean(), abs=TOLERANCE)
        assert list(result.control_spans["other"]) == [1, 2, 3]
        for size, row in result.control_spans["other"].items():
            model = plain(control[layer], slice(size), None)
            assert row["kl"] == pytest.approx(model.mean(), abs=TOLERANCE)
        assert result.resumed


def test_intervals_resample_documents(tiny_cache: ActivationCache, blocks: DecoderBlocks) -> None:
    layer = 2
    result = measure(tiny_cache, blocks, [layer])[layer]
    basis, affine = random_basis(tiny_cache, layer), random_map(tiny_cache, layer)
    sequences = draw_sequences(tiny_cache, tiny_cache.sequences("test"), POSITIONS, 0)
    units = ResamplingUnits.of(tiny_cache, sequences, 0)
    weights = resampling_counts(units.n_resampled, 0)
    assert result.units == units.count > 2
    number_of = units.unit_numbers
    sizes = np.bincount(number_of).astype(float)

    def sums(directions: Any, lens: AffineMap | None) -> np.ndarray:
        values = plain_influence(tiny_cache, blocks, layer, basis, directions, lens)
        return np.bincount(number_of, values)

    low, high = bootstrap_interval(sizes, sums(slice(4), None), weights)
    row = result.model_span[4]
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=TOLERANCE)
    low, high = bootstrap_interval(sizes, sums(slice(2), affine), weights)
    row = result.lens_span[2]
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=TOLERANCE)

    # Spearman of every resample by scipy.
    lens, model = (np.stack([sums([n], m) for n in range(K)]) for m in (affine, None))
    values = [
        spearman(lens @ draw / (sizes @ draw), model @ draw / (sizes @ draw))
        for draw in weights
        if sizes @ draw
    ]
    expected = spearman(lens.sum(1), model.sum(1))
    assert result.spearman["value"] == pytest.approx(expected, abs=1e-12)
    bounds = np.percentile(values, (2.5, 97.5))
    assert (result.spearman["low"], result.spearman["high"]) == pytest.approx(tuple(bounds))


@pytest.mark.parametrize("name", ["tiny_cache", "ragged"])
@pytest.mark.parametrize("drop_first", [0, 3])
def test_the_alignment_is_that_of_a_plain_loop(
    name: str, drop_first: int, blocks: DecoderBlocks, request: pytest.FixtureRequest
) -> None:
    cache: ActivationCache = request.getfixturevalue(name)
    layer = 2
    result = measure(cache, blocks, [layer], drop_first=drop_first)[layer]
    basis, affine = random_basis(cache, layer), random_map(cache, layer)
    sample = InfluenceSample.draw(cache, POSITIONS, drop_first, 0)
    points = StimulusPoints.draw(sample, 24, 0)
    replaced = cache.positions_of(sample.sequences)[points.sample_index]
    cosines: dict[str, list[float]] = {"whole": [], "span": []}
    for position, donor in zip(replaced, points.donors, strict=True):
        number = int(np.searchsorted(cache.sequence_start, position, "right")) - 1
        positions = cache.positions_of(np.array([number]))
        ids = cache.tokens.take(positions)
        index = int(position - positions[0])
        rows = cache.residual_array(layer).take(positions).astype(np.float64)
        state = cache.residual_array(layer)[int(donor)].astype(np.float64)
        for kind, new in (
            ("whole", state),
            ("span", ablated(rows[index], basis, slice(K), state)),
        ):
            changed = rows.copy()
            changed[index] = new
            r0, r1 = (hooked_log_probs(blocks, layer, h, ids)[index] for h in (rows, changed))
            s0, s1 = (
                log_softmax(cache.head.logits(affine(h[index]).astype(np.float32)))
                for h in (rows, changed)
            )
            w = (np.exp(r0) + np.exp(r1)) / 2
            x, y = s1 - s0, r1 - r0
            x, y = x - (w * x).sum(), y - (w * y).sum()
            cosines[kind].append((w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum()))
    for row, values in (
        (result.alignment, cosines["whole"]),
        (result.span_alignment, cosines["span"]),
    ):
        assert row["n"] == 24
        # Relative rounding of a change: of small changes in float32, 1e-5 of the cosine.
        assert row["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        bounds = [float(row[name] or np.nan) for name in ("low", "mean", "high")]
        assert bounds == sorted(bounds)
        assert np.isfinite(bounds).all()


def test_any_batch_size_gives_the_same(ragged: ActivationCache, blocks: DecoderBlocks) -> None:
    results = [measure(ragged, blocks, [1], batch_tokens=tokens)[1] for tokens in (1, 130, 100_000)]
    for other in results[1:]:
        for name in ("model_influences", "lens_influences"):
            first, second = (getattr(r, name) for r in (results[0], other))
            assert second == pytest.approx(first, abs=TOLERANCE)
        for name in ("model_span", "lens_span"):
            for size, row in getattr(other, name).items():
                assert row == pytest.approx(getattr(results[0], name)[size], abs=TOLERANCE)
        for name in ("alignment", "span_alignment"):
            assert getattr(other, name) == pytest.approx(getattr(results[0], name), abs=1e-5)


def test_the_last_layer_with_the_identity_is_the_model(
    tiny_cache: ActivationCache, blocks: DecoderBlocks
) -> None:
    layer, d = tiny_cache.n_blocks, tiny_cache.d_model
    result = measure_model_influence(
        tiny_cache,
        {layer: random_basis(tiny_cache, layer)},
        {layer: AffineMap(np.eye(d), np.zeros(d))},
        blocks,
        positions=POSITIONS,
        alignment_positions=24,
    )[layer]
    assert result.model_influences == pytest.approx(result.lens_influences, abs=TOLERANCE)
    assert result.spearman["value"] == pytest.approx(1.0)
    assert result.alignment["mean"] == pytest.approx(1.0, abs=1e-6)
    assert result.span_alignment["mean"] == pytest.approx(1.0, abs=1e-6)


def test_positions_that_are_dropped_stay_as_they_are(
    tiny_cache: ActivationCache, blocks: DecoderBlocks
) -> None:
    """Where all but the last position is dropped, the others' rows have no influence."""
    length = int(tiny_cache.sequence_length.max())
    result = measure(tiny_cache, blocks, [2], drop_first=length - 1)[2]
    basis = random_basis(tiny_cache, 2)
    values = plain_influence(tiny_cache, blocks, 2, basis, [0], None, length - 1)
    assert result.n == len(values)
    assert result.model_influences[0] == pytest.approx(values.mean(), abs=TOLERANCE)


def test_one_document_and_few_directions_have_no_intervals(
    model_folder: Path, tmp_path: Path, blocks: DecoderBlocks
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in models.texts(60, seed=8)))
    cache = residua.extract(
        str(model_folder), str(path), root=tmp_path / "root", context=64, pack=False
    )
    layer = 1
    bases = {layer: random_basis(cache, layer, k=2)}
    maps = {layer: random_map(cache, layer)}
    # One sequence, the longest that may be drawn.
    result = measure_model_influence(cache, bases, maps, blocks, positions=1)[layer]
    assert result.units == 1
    assert result.spearman == {"value": None, "low": None, "high": None}
    assert result.model_span[2]["low"] is result.model_span[2]["high"] is None
    assert result.alignment["low"] is None
    assert result.alignment["n"] == result.n
    # One row.
    length = int(cache.sequence_length[draw_sequences(cache, cache.sequences("test"), 1, 0)][0])
    one = measure_model_influence(cache, bases, maps, blocks, positions=1, drop_first=length - 1)[
        layer
    ]
    assert one.n == 1
    assert one.alignment == {"mean": None, "low": None, "high": None, "n": 0}
    plain = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert plain["layer"] == 1
    assert plain["model_span"]["2"]["kl"] == pytest.approx(one.model_span[2]["kl"])


def test_progress_counts_positions_times_layers(
    tiny_cache: ActivationCache, blocks: DecoderBlocks
) -> None:
    calls: list[tuple[int, int]] = []
    results = measure(
        tiny_cache, blocks, [1, 2], batch_tokens=64,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    total = 2 * results[1].n
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_no_state_is_replaced_if_none_is_requested(
    tiny_cache: ActivationCache, blocks: DecoderBlocks
) -> None:
    result = measure(tiny_cache, blocks, [2], alignment_positions=0)[2]
    none = {"mean": None, "low": None, "high": None, "n": 0}
    assert result.alignment == result.span_alignment == none
    assert result.model_influences == measure(tiny_cache, blocks, [2])[2].model_influences


def test_a_model_that_cannot_be_resumed_runs_whole(
    tiny_cache: ActivationCache, blocks: DecoderBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.model.resume import ResumableRun

    expected = measure(tiny_cache, blocks, [2])[2]

    def fail(*_: Any) -> torch.Tensor:
        raise KeyError("shared keys")

    monkeypatch.setattr(ResumableRun, "resume", fail)
    result = measure(tiny_cache, blocks, [2])[2]
    assert not result.resumed
    assert replace(result, resumed=True) == expected


# Refusals


def test_another_model_is_refused(tiny_cache: ActivationCache) -> None:
    def blocks_of(kind: str, seed: int) -> DecoderBlocks:
        ids = torch.randint(0, models.VOCAB, (2, 4, 48), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return find_blocks(models.build_model(kind, seed=seed), ids[0], ids[1])

    with pytest.raises(MismatchError, match="does not give the logits of this GPTNeoX"):
        measure(tiny_cache, blocks_of("gpt_neox", 3), [1])
    shallow = blocks_of("gpt_neox", 0)
    shallow.blocks = shallow.blocks[:2]
    with pytest.raises(MismatchError, match="3 blocks of width 32, this model has 2 of width 32"):
        measure(tiny_cache, shallow, [1])


def test_bases_and_maps_that_do_not_fit_are_refused(
    tiny_cache: ActivationCache, blocks: DecoderBlocks
) -> None:
    cache = tiny_cache
    bases, maps = {1: random_basis(cache, 1)}, {1: random_map(cache, 1)}
    narrow = LayerBasis(np.eye(2, 5), np.eye(2, 5), np.zeros(5))
    with pytest.raises(UsageError, match="there is no basis"):
        measure_model_influence(cache, {}, maps, blocks)
    with pytest.raises(UsageError, match="found none for layers 1"):
        measure_model_influence(cache, bases, {2: maps[1]}, blocks)
    with pytest.raises(UsageError, match=r"expected a basis \(k, 32\) of layer 1"):
        measure_model_influence(cache, {1: narrow}, maps, blocks)
    with pytest.raises(UsageError, match=r"controls\['pca'\]: expected a basis"):
        measure_model_influence(cache, bases, maps, blocks, controls={"pca": {1: narrow}})
    with pytest.raises(UsageError, match=r"expected a map \(32, 32\) of layer 1"):
        measure_model_influence(cache, bases, {1: AffineMap(np.eye(3), np.zeros(3))}, blocks)
    with pytest.raises(NotFoundError):
        measure_model_influence(cache, {9: bases[1]}, {9: maps[1]}, blocks)
    with pytest.raises(UsageError, match="drop_first"):
        measure_model_influence(cache, bases, maps, blocks, drop_first=-1)
    with pytest.raises(UsageError, match="no test sequence is longer than drop_first=1000"):
        measure_model_influence(cache, bases, maps, blocks, drop_first=1000)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"positions": 0}, "positions must be 1 or more, not 0"),
        ({"positions": 2.5}, "positions"),
        ({"alignment_positions": -1}, "alignment_positions must be 0 or more"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
    ]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            measure_model_influence(cache, bases, maps, blocks, **options)


def test_a_cache_of_some_positions_is_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path, blocks: DecoderBlocks
) -> None:
    cache = residua.extract(
        str(model_folder), str(texts_file), root=tmp_path, context=64, positions="last"
    )
    with pytest.raises(UsageError, match="positions='all'"):
        measure(cache, blocks, [1])


# The parts


def test_span_sizes_are_powers_of_two_and_k() -> None:
    assert [span_sizes(k) for k in (1, 2, 3, 4, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


def test_the_rank_correlation_is_scipys_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    sizes = np.ones(6)
    weights = resampling_counts(6, 0, resamples=50)
    lens = rng.integers(0, 3, (5, 6)).astype(float)
    model = lens + rng.integers(0, 3, (5, 6))
    result = rank_correlation(lens, model, sizes, weights)
    assert result["value"] == pytest.approx(spearman(lens.sum(1), model.sum(1)))
    # Equal influences have no ranks.
    flat = rank_correlation(np.ones((5, 6)), model, sizes, weights)
    assert flat == {"value": None, "low": None, "high": None}
    # One document has no interval.
    single = rank_correlation(
        lens[:, :1] + np.arange(5)[:, None], model[:, :1], sizes[:1], weights[:, :1]
    )
    assert single["low"] is None


def test_points_are_counted_positions_and_donors_others(tiny_cache: ActivationCache) -> None:
    sample = InfluenceSample.draw(tiny_cache, POSITIONS, 2, 0)
    positions = tiny_cache.positions_of(sample.sequences)
    points = StimulusPoints.draw(sample, 100, 3)
    assert len(points.sample_index) == 100
    assert sample.counted[points.sample_index].all()
    assert (np.diff(points.sample_index) > 0).all()
    assert np.isin(points.donors, positions[sample.counted]).all()
    assert (points.donors != positions[points.sample_index]).all()
    # More points than positions: each position once.
    every = StimulusPoints.draw(sample, 10_000, 3)
    assert (every.sample_index == np.flatnonzero(sample.counted)).all()
    # All rounds of all batches: each point once, one per sequence in a round.
    seen = []
    for batch in sample.batches(200):
        for numbers, indices in points.rounds(batch):
            assert (batch.sample_index[indices] == points.sample_index[numbers]).all()
            assert len(set(batch.row[indices])) == len(indices)
            seen += numbers.tolist()
    assert sorted(seen) == list(range(100))


def test_batches_obey_the_rules_of_the_cache(ragged: ActivationCache) -> None:
    sample = InfluenceSample.draw(ragged, POSITIONS, 0, 0)
    lengths = ragged.sequence_length

    def batches(**extra: Any) -> list[np.ndarray]:
        cache = ActivationCache(ragged.path)
        cache.manifest = replace(cache.manifest, extra={**cache.manifest.extra, **extra})
        return [b.sequences for b in replace(sample, cache=cache).batches(256)]

    padded = batches(pad=True)
    assert any(len(set(lengths[b])) > 1 for b in padded)
    assert all(len(b) * lengths[b].max() <= 256 or len(b) == 1 for b in padded)
    assert all(len(set(lengths[b])) == 1 for b in batches(pad=False))
    assert all(len(b) == 1 for b in batches(batch="alone"))
    for group in (padded, batches(pad=False), batches(batch="alone")):
        assert sorted(np.concatenate(group)) == sample.sequences.tolist()


def test_ids_and_mask_are_those_of_an_extraction(ragged: ActivationCache) -> None:
    sample = InfluenceSample.draw(ragged, POSITIONS, 1, 0)
    for batch in sample.batches(256):
        ids, mask, counted = batch.model_inputs(torch.device("cpu"))
        assert (mask is None) == (len(set(batch.lengths)) == 1)
        for row, number in enumerate(batch.sequences):
            start, length = ragged.sequence_start[number], ragged.sequence_length[number]
            assert (ids[row, :length].numpy() == ragged.tokens[start : start + length]).all()
            assert not ids[row, length:].any()
            assert counted[row].nonzero().flatten().tolist() == list(range(1, length))
            assert mask is None or mask[row].tolist() == [1] * length + [0] * (
                ids.shape[1] - length
            )


def test_a_saved_model_of_tuples_is_measured(texts_file: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bloom", "bloom")
    cache = residua.extract(str(folder), str(texts_file), root=tmp_path / "root", context=32)
    blocks = load_model_of(cache)
    result = measure(cache, blocks, [1], positions=POSITIONS)[1]
    values = plain_influence(cache, blocks, 1, random_basis(cache, 1), [2])
    assert result.model_influences[2] == pytest.approx(values.mean(), abs=TOLERANCE)
