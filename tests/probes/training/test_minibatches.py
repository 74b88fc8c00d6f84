"""Minibatches: each pair once per epoch, right targets, any batch without those before it."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.cache.background import iterate_in_background
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.format.array import CacheArray
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.slab_shuffle import Slabs
from residua.probes.training.minibatches import Minibatch, MinibatchStream
from residua.probes.training.shuffled_batches import ShuffledBatches

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, OFFSETS = 6, 11, (0, 1, 3)


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """90 sequences of 1 to 40 tokens; the values of a row name its layer and position."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 41, 90).tolist()
    layers = [rng.normal(size=(sum(lengths), WIDTH)) for _ in range(3)]
    folder = tmp_path_factory.mktemp(request.param)
    return make_cache(folder, layers, lengths, random_head(WIDTH, VOCAB), dtype=request.param)


def check_minibatch(cache: ActivationCache, minibatch: Minibatch) -> None:
    """Compare a minibatch with a plain loop over its positions."""
    tokens, last = cache.tokens[:], cache.residual_array(cache.n_blocks)[:]
    starts, lengths = cache.sequence_start, cache.sequence_length
    for layer, rows in minibatch.hidden.items():
        np.testing.assert_array_equal(rows, cache.residual_array(layer)[:][minibatch.positions])
    for offset, ahead in minibatch.ahead.items():
        assert ahead.residual is not None
        for row, t in enumerate(minibatch.positions.tolist()):
            sequence = int(np.searchsorted(starts, t, "right")) - 1
            end = int(starts[sequence] + lengths[sequence])
            inside = t + offset < end
            assert bool(ahead.valid[row]) is inside
            assert int(ahead.token[row]) == (tokens[t + offset] if inside else -1)
            goes_on = t + offset + 1 < end
            assert int(ahead.text[row]) == (tokens[t + offset + 1] if goes_on else -1)
            expected = last[t + offset] if inside else np.zeros(WIDTH)
            np.testing.assert_array_equal(ahead.residual[row], expected)


@pytest.mark.parametrize(("batch", "buffer"), [(64, 200), (33, 10_000), (300, 128), (5000, 64)])
def test_an_epoch_gives_every_position_once_with_its_targets(
    uneven: ActivationCache, batch: int, buffer: int
) -> None:
    stream = MinibatchStream(uneven, [0, 2], OFFSETS, batch=batch, buffer_rows=buffer, slab_rows=16)
    minibatches = list(stream.epoch(3))
    for minibatch in minibatches:
        check_minibatch(uneven, minibatch)
    expected = uneven.positions_of(uneven.sequences("train"))
    positions = torch.cat([minibatch.positions for minibatch in minibatches]).numpy()
    assert (positions != expected).any()
    np.testing.assert_array_equal(np.sort(positions), expected)
    assert len(minibatches) == stream.steps
    assert [minibatch.step for minibatch in minibatches] == list(range(stream.steps))
    assert all(len(minibatch) == batch for minibatch in minibatches[:-1])


def test_without_shuffling_positions_come_in_order(uneven: ActivationCache) -> None:
    stream = MinibatchStream(uneven, [1], [0], split="validation", batch=50, shuffle=False)
    positions = torch.cat([minibatch.positions for minibatch in stream]).numpy()
    np.testing.assert_array_equal(positions, uneven.positions_of(uneven.sequences("validation")))


def equal_minibatches(first: Minibatch, second: Minibatch) -> bool:
    ahead = [(a, second.ahead[n]) for n, a in first.ahead.items()]
    return (
        (first.epoch, first.step) == (second.epoch, second.step)
        and torch.equal(first.positions, second.positions)
        and all(torch.equal(rows, second.hidden[la]) for la, rows in first.hidden.items())
        and all(torch.equal(getattr(a, f), getattr(b, f)) for a, b in ahead for f in vars(a))
    )


def test_any_batch_is_reached_without_the_ones_before(
    uneven: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = MinibatchStream(
        uneven, [0, 1], OFFSETS, batch=50, buffer_rows=120, slab_rows=16, seed=5
    )
    whole = list(stream.epoch(2))
    rows_read: list[int] = []
    read_stored = CacheArray.read_stored

    def read_and_count(self: CacheArray, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        rows_read.append(stop - start)
        return read_stored(self, start, stop, out)

    monkeypatch.setattr(CacheArray, "read_stored", read_and_count)
    totals = []
    for step in range(stream.steps + 1):
        rows_read.clear()
        minibatches = list(stream.epoch(2, step))
        assert len(minibatches) == stream.steps - step
        assert all(equal_minibatches(a, b) for a, b in zip(minibatches, whole[step:], strict=True))
        totals.append(sum(rows_read))
    assert totals[-1] == 0
    assert totals[stream.steps // 2] < 0.7 * totals[0]


def test_epochs_and_seeds_differ_and_repeat(uneven: ActivationCache) -> None:
    def first_positions(seed: int, epoch: int) -> list[int]:
        return next(
            MinibatchStream(uneven, [0], [0], seed=seed, batch=40).epoch(epoch)
        ).positions.tolist()

    assert first_positions(0, 0) == first_positions(0, 0)
    assert len({tuple(first_positions(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_prefetching_changes_nothing(uneven: ActivationCache) -> None:
    plain, ahead = (
        MinibatchStream(uneven, [0, 2], OFFSETS, batch=64, buffer_rows=200, prefetch=n)
        for n in (0, 2)
    )
    assert all(equal_minibatches(a, b) for a, b in zip(plain.epoch(1), ahead.epoch(1), strict=True))


def test_a_prefetching_thread_ends_with_its_reader_and_hands_on_errors() -> None:
    import threading

    def broken():
        yield 1
        raise ValueError("no more")

    before = threading.active_count()
    items = iterate_in_background(iter(range(1000)), 2)
    assert list(islice(items, 3)) == [0, 1, 2]
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="no more"):
        list(iterate_in_background(broken(), 1))


def test_quarantined_sequences_are_left_out(tmp_path: Path) -> None:
    lengths = [8] * 40
    tiny = make_cache(tmp_path, [np.ones((320, WIDTH))] * 2, lengths, random_head(WIDTH, VOCAB))
    bad = int(tiny.sequences("train")[3])
    tiny.quarantined[bad] = "inf"
    positions = torch.cat(
        [minibatch.positions for minibatch in MinibatchStream(tiny, [0], [0], batch=7)]
    )
    start = int(tiny.sequence_start[bad])
    assert not ((positions >= start) & (positions < start + 8)).any()
    assert len(positions) == 8 * len(tiny.sequences("train"))


def test_a_bounded_subset_takes_whole_sequences(uneven: ActivationCache) -> None:
    stream = MinibatchStream(
        uneven, [0], [0], split="validation", max_positions=60, shuffle=False, seed=1
    )
    again = MinibatchStream(
        uneven, [0], [0], split="validation", max_positions=60, shuffle=False, seed=1
    )
    assert 20 <= stream.positions <= 60
    np.testing.assert_array_equal(stream.sequences, again.sequences)
    assert set(stream.sequences) <= set(uneven.sequences("validation"))
    assert stream.positions == uneven.sequence_length[stream.sequences].sum()


def test_the_buffer_keeps_to_its_bytes(uneven: ActivationCache) -> None:
    small = MinibatchStream(uneven, [0, 1], [0], batch=16, buffer_bytes=4096)
    assert small.order.buffer_size < 128 < small.positions
    assert MinibatchStream(uneven, [0, 1], [0], batch=16).order.buffer_size == small.positions


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_an_order_are_whole_and_last_ones_can_be_dropped(drop_last: bool) -> None:
    slabs = Slabs.cut(np.array([0, 100, 200]), np.array([37, 5, 64]), 10)
    assert slabs.rows == 106
    order = ShuffledBatches(slabs, 25, seed=1, buffer_rows=30, drop_last=drop_last)
    assert order.steps == (4 if drop_last else 5)
    for first in range(order.steps):
        sizes, open_rows = [], 0
        for group in order.groups(0, first):
            for number, piece in enumerate(group.pieces):
                open_rows += len(piece)
                if number < len(group.pieces) - 1 or group.complete:
                    sizes.append(open_rows)
                    open_rows = 0
        assert open_rows == 0
        assert sizes == ([25] * 4 + ([] if drop_last else [6]))[first:]
    assert ShuffledBatches(slabs, 500, drop_last=True).steps == 1


def test_what_cannot_be_right_is_refused(uneven: ActivationCache) -> None:
    with pytest.raises(NotFoundError, match="layer 7"):
        MinibatchStream(uneven, [7], [0])
    for layers, offsets in (([], [0]), ([0], []), ([0], [-1])):
        with pytest.raises(UsageError, match="offsets are 0 or more"):
            MinibatchStream(uneven, layers, offsets)
    wrong: dict[str, Any]
    for wrong in ({"batch": 0}, {"seed": -1}, {"max_positions": 0}, {"buffer_rows": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            MinibatchStream(uneven, [0], [0], **wrong)
    with pytest.raises(UsageError, match="has no position"):
        MinibatchStream(uneven, [0], [0], sequences=np.array([], np.int64))
