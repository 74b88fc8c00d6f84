"""Shuffled order of slabs: every row once per epoch, any range of the order reached directly."""

from dataclasses import replace

import numpy as np
import pytest

from residua.cache.store.slab_shuffle import Slabs, SlabShuffle

SHUFFLE = SlabShuffle(
    Slabs.cut(np.array([0, 100, 200]), np.array([37, 5, 64]), 10), seed=3, buffer_rows=25
)


def rows_in_order(shuffle: SlabShuffle, epoch: int, start: int = 0, stop: int | None = None):
    """Row numbers in the order in which they leave the buffer."""
    rows = []
    for filling in shuffle.fillings(epoch, start, stop):
        slabs = shuffle.slabs.select(filling.slabs)
        buffer = [np.arange(a, a + n) for a, n in zip(slabs.starts, slabs.sizes, strict=True)]
        assert slabs.rows <= shuffle.buffer_size
        rows += np.concatenate(buffer)[filling.rows].tolist()
    return rows


def test_runs_are_cut_into_slabs_of_at_most_the_limit() -> None:
    slabs = SHUFFLE.slabs
    assert slabs.starts.tolist() == [0, 10, 20, 30, 100, *range(200, 264, 10)]
    assert slabs.sizes.tolist() == [10, 10, 10, 7, 5, *[10] * 6, 4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_per_epoch_in_an_order_of_its_own(shuffle: bool) -> None:
    order = replace(SHUFFLE, shuffle=shuffle)
    expected = [*range(37), *range(100, 105), *range(200, 264)]
    first, second = rows_in_order(order, 0), rows_in_order(order, 1)
    assert sorted(first) == sorted(second) == expected
    assert (first == expected) == (first == second) == (not shuffle)
    assert rows_in_order(order, 0) == first


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 106), (1, None), (30, 70), (105, 106), (106, None)]
)
def test_a_range_of_the_order_is_that_of_the_whole_order(start: int, stop: int | None) -> None:
    assert rows_in_order(SHUFFLE, 2, start, stop) == rows_in_order(SHUFFLE, 2)[start:stop]


def test_readers_share_the_slabs() -> None:
    rows = [rows_in_order(replace(SHUFFLE, reader=n, readers=3), 0) for n in range(3)]
    assert sorted(sum(rows, [])) == sorted(rows_in_order(SHUFFLE, 0))
