"""Rows changed in a cached layer reach the model's predictions as a run by hand says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.interventions.effects import Effects, measure_effects
from residua.analysis.interventions.layer_runs import (
    LayerRuns,
    choose_layers,
    mean_rows,
    same_passage,
    spaced_positions,
)
from residua.analysis.interventions.row_changes import (
    add_vector,
    remove_component,
    replace_by,
    resample_rows,
)
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.resuming.model_resuming import load_model
from residua.probes.basis.layer_basis import LayerBasis

from ...support import models


@pytest.fixture(scope="module")
def runs(tiny_cache: residua.ActivationCache) -> LayerRuns:
    return LayerRuns.prepare(tiny_cache, max_positions=300, seed=3, device="cpu")


def test_changed_rows_give_the_logits_of_a_plain_hook(runs: LayerRuns) -> None:
    module: Any = runs.model.blocks.model
    for batch in runs.batches():
        rows = batch.rows(2)
        changed = 1.3 * rows + 0.1
        with torch.inference_mode():
            logits = batch.logits(2, changed)
        row, column = (torch.from_numpy(i) for i in (batch.batch.row, batch.batch.column))

        def overwrite(
            _: Any, __: Any, output: Any, at: Any = (row, column), new: Any = changed
        ) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            hidden = hidden.clone()
            hidden[at] = new
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = runs.model.blocks.blocks[1].register_forward_hook(overwrite)
        try:
            expected = module(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
            ).logits[row, column]
        finally:
            handle.remove()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_unchanged_rows_give_the_heads_logits(runs: LayerRuns) -> None:
    cache = runs.cache
    with torch.inference_mode():
        for batch in runs.batches():
            expected = cache.head.logits(batch.rows(cache.n_blocks).numpy())
            for layer in range(cache.n_blocks + 1):
                logits = batch.clean_logits(layer).numpy()
                assert np.abs(logits - expected).max() < 3e-2 * np.abs(expected).max()


def test_another_model_is_refused(tiny_cache: residua.ActivationCache) -> None:
    other = load_model(models.build_model("gpt_neox", seed=5))
    batch = next(iter(LayerRuns.prepare(tiny_cache, other, max_positions=100).batches()))
    with pytest.raises(MismatchError, match="layer 1 of the cache does not give"):
        batch.clean_logits(1)
    with pytest.raises(MismatchError, match="this model has 2 of width 16"):
        LayerRuns.prepare(tiny_cache, load_model_of_toy())


def load_model_of_toy() -> Any:
    from residua.cache.model.block_search import find_blocks
    from residua.cache.resuming.resumable_model import ResumableModel, random_ids

    from ...support import toys

    toy = toys.Toy()
    with torch.inference_mode():
        return ResumableModel(find_blocks(toy, *(random_ids(toy, (4, 48), s) for s in (0, 1))))


def test_a_cache_of_some_positions_is_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    cache = residua.extract(
        str(model_folder), str(texts_file), root=tmp_path, positions="sample:5", max_tokens=600
    )
    with pytest.raises(UsageError, match="--positions all"):
        LayerRuns.prepare(cache)


def test_effects_equal_float64_formulas_on_odd_input() -> None:
    rng = np.random.default_rng(0)
    clean, changed = rng.normal(size=(2, 7, 11)) * 4
    clean[2, 3] = np.nan
    changed[3, 1] = np.inf
    clean[4, 5] = -np.inf
    text = np.array([0, 10, 3, 4, -1, 5, 6])
    found = measure_effects(
        torch.from_numpy(clean).float(), torch.from_numpy(changed).float(), text
    )
    clean32, changed32 = clean.astype(np.float32), changed.astype(np.float32)
    for number in range(7):
        if number in (2, 3):
            assert all(np.isnan(found[name][number]) for name in found)
            continue
        p, q = (
            x[number].astype(np.float64) - np.logaddexp.reduce(x[number].astype(np.float64))
            for x in (clean32, changed32)
        )
        mass = np.exp(p)
        kl = sum(m * (a - b) for m, a, b in zip(mass, p, q, strict=True) if m > 0)
        assert found["kl"][number] == pytest.approx(kl, rel=1e-9)
        assert found["flip"][number] == (p.argmax() != q.argmax())
        if text[number] >= 0:
            change = p[text[number]] - q[text[number]]
            assert found["loss_change"][number] == pytest.approx(change, rel=1e-9)
        else:
            assert np.isnan(found["loss_change"][number])
    empty = measure_effects(torch.zeros(0, 11), torch.zeros(0, 11), np.zeros(0, np.int64))
    assert {name: len(values) for name, values in empty.items()} == {
        "kl": 0, "loss_change": 0, "flip": 0
    }  # fmt: skip


def test_spaced_positions_have_their_distance_and_their_followers(runs: LayerRuns) -> None:
    sample = runs.sample
    chosen = spaced_positions(sample, 8, 3)
    numbers = np.flatnonzero(chosen)
    same_sequence = np.diff(sample.sequence_numbers[numbers]) == 0
    assert set(np.diff(numbers)[same_sequence] % 8) == {0}
    documents = sample.cache.document_numbers
    for number in numbers:
        assert len({*sample.sequence_numbers[number : number + 4]}) == 1
        if documents is not None:
            assert len({*documents.take(sample.positions[number : number + 4])}) == 1
    assert not same_passage(sample, sample.count).any()
    with pytest.raises(UsageError, match="spacing must be more than 3"):
        spaced_positions(sample, 3, 3)
    with pytest.raises(UsageError, match="smaller --spacing"):
        spaced_positions(sample, 10**6, 63)


def test_layers_are_counted_from_the_end_and_missing_ones_are_said(
    tiny_cache: residua.ActivationCache,
) -> None:
    assert choose_layers(tiny_cache, None) == [0, 1, 2]
    assert choose_layers(tiny_cache, [-1, 1]) == [1, 3]
    with pytest.raises(NotFoundError, match="9"):
        choose_layers(tiny_cache, 9)
    with pytest.raises(UsageError, match="start at 1"):
        choose_layers(tiny_cache, 0, lowest=1)


def test_means_are_those_of_finite_rows_of_the_train_split(
    tiny_cache: residua.ActivationCache,
) -> None:
    positions = tiny_cache.positions_of(tiny_cache.sequences("train"))
    expected = np.asarray(tiny_cache.residual_array(1).take(positions), np.float64).mean(0)
    np.testing.assert_allclose(mean_rows(tiny_cache, [1])[1], expected, rtol=1e-6, atol=1e-9)


def basis_of(d: int, k: int = 2, seed: int = 0) -> LayerBasis:
    rng = np.random.default_rng(seed)
    encoder = rng.normal(size=(k, d))
    decoder = np.linalg.solve(encoder @ encoder.T, encoder)
    return LayerBasis(encoder, decoder, rng.normal(size=d))


def test_an_amount_of_0_is_bit_for_bit_unchanged_and_1_removes() -> None:
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    rows[0, 0] = -0.0
    rows[1, 1] = float("nan")
    basis, numbers = basis_of(6), np.arange(9)
    unchanged = remove_component(basis, 0.0)(rows, numbers)
    assert unchanged.numpy().tobytes() == rows.numpy().tobytes()
    assert add_vector(np.ones(6), 0.0)(rows, numbers) is rows
    finite = rows[2:]
    for k in (1, 2):
        removed = remove_component(basis, 1.0, k)(finite, numbers)
        torch.testing.assert_close(removed, basis.ablate(finite, k), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(basis.coordinates(removed, k), 0, atol=1e-5)
        doubled = remove_component(basis, -1.0, k)(finite, numbers)
        torch.testing.assert_close(
            basis.coordinates(doubled, k), 2 * basis.coordinates(finite, k), rtol=1e-4, atol=1e-5
        )


def test_replacing_and_resampling_take_the_right_rows(runs: LayerRuns) -> None:
    sample = runs.sample
    numbers = np.arange(sample.count)
    rows = torch.from_numpy(np.asarray(runs.cache.residual_array(1).take(sample.positions)))
    resampled = resample_rows(sample, 1)(rows.float(), numbers)
    # Each row is given once, and never to its own position.
    order = np.lexsort(rows.float().numpy().T)
    other = np.lexsort(resampled.numpy().T)
    np.testing.assert_array_equal(rows.float().numpy()[order], resampled.numpy()[other])
    constant = replace_by(np.arange(32.0))(rows.float(), numbers)
    assert torch.equal(constant, torch.arange(32.0).expand(sample.count, 32))


def test_effects_that_are_not_finite_do_not_count(
    tiny_cache: residua.ActivationCache, runs: LayerRuns
) -> None:
    effects = Effects(runs.sample)
    logits = torch.randn(4, tiny_cache.vocab)
    spoiled = logits.clone()
    spoiled[1] = float("nan")
    effects.add(("x",), np.array([0, 3, 5, 7]), logits, spoiled)
    assert effects.count(("x",)) == 3
    assert effects.mean(("x",), "kl")[0] == pytest.approx(0.0)
    measured = np.zeros(runs.sample.count, bool)
    measured[[0, 3, 5, 7]] = True
    assert effects.undefined([("x",)], measured) == 1
