"""Claims about exchanged positions: other sequences, same split, each once, any block alike."""

from pathlib import Path

import numpy as np
import pytest

from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.splits import SPLITS
from residua.probes.controls import position_shuffle as shuffle
from residua.probes.controls.position_shuffle import PositionShuffle

from ...support.synthetic import make_cache, random_head


def cache_of(root: Path, lengths: list[int]) -> ActivationCache:
    layer = np.arange(sum(lengths) * 2, dtype=np.float32).reshape(-1, 2)
    head = random_head(2, 7)
    return make_cache(root, [layer], lengths, head, part_rows=1 << 15, chunk_rows=1 << 12)


def sequence_of(cache: ActivationCache, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(cache.sequence_start, rows, "right") - 1


@pytest.fixture(scope="module", params=["many", "few", "two"])
def tiny_cache(request, tmp_path_factory) -> ActivationCache:
    rng = np.random.default_rng(5)
    lengths = {
        "many": rng.integers(1, 60, 900).tolist(),
        "few": rng.integers(20, 30, 70).tolist(),
        # A tenth of them makes a split of two or three.
        "two": [40] * 38,
    }
    return cache_of(tmp_path_factory.mktemp("caches"), lengths[request.param])


def test_each_position_meets_one_of_another_sequence_of_its_split(tiny_cache, monkeypatch):
    monkeypatch.setattr(shuffle, "SLABS", 100)
    found = PositionShuffle(tiny_cache)
    for name in SPLITS:
        rows = tiny_cache.positions_of(tiny_cache.sequences(name))
        there = found(rows)
        assert np.isin(there, rows).all()
        assert (sequence_of(tiny_cache, rows) != sequence_of(tiny_cache, there)).all()
        # All of them are met, but for fewer than a slab.
        size = max(1, min(len(rows) // 100, tiny_cache.slab_rows))
        assert len(np.unique(there)) > len(rows) - size


def test_blocks_do_not_change_who_meets_whom(tiny_cache):
    rows = tiny_cache.positions_of(tiny_cache.sequences("all"))
    found = PositionShuffle(tiny_cache)
    parts = [found(rows[i : i + 37]) for i in range(0, len(rows), 37)]
    assert np.array_equal(np.concatenate(parts), found(rows))
    mixed = np.random.default_rng(0).permutation(rows)
    assert np.array_equal(found(mixed), found(rows)[mixed])


def test_the_seed_decides(tiny_cache):
    rows = tiny_cache.positions_of(tiny_cache.sequences("train"))
    first = PositionShuffle(tiny_cache, 1)(rows)
    assert np.array_equal(first, PositionShuffle(tiny_cache, 1)(rows))
    assert not np.array_equal(first, PositionShuffle(tiny_cache, 2)(rows))


def test_nothing_is_left_of_the_place_in_the_sequence(tmp_path):
    lengths = [64] * 600
    tiny = cache_of(tmp_path, lengths)
    rows = tiny.positions_of(tiny.sequences("train"))
    places = np.stack([rows % 64, PositionShuffle(tiny)(rows) % 64])
    together = np.zeros((64, 64))
    np.add.at(together, tuple(places), 1)
    expected = together.sum() / together.size
    # Slabs move together: far from exact, but no place prefers another one.
    assert together.max() < 8 * expected
    assert abs(np.corrcoef(places)[0, 1]) < 0.02


def test_a_block_reads_whole_slabs(tmp_path):
    tiny = cache_of(tmp_path, [50] * 4000)
    rows = tiny.positions_of(tiny.sequences("train"))
    there = np.sort(PositionShuffle(tiny)(rows[:12800]))
    runs = 1 + np.count_nonzero(np.diff(there) != 1)
    assert runs <= 12800 / 128 * 4  # slabs, cut where sequences of other splits lie between


def test_quarantined_sequences_stay_and_are_met_by_nobody(tmp_path):
    tiny = cache_of(tmp_path, [20] * 100)
    number = int(tiny.sequences("train")[3])
    vars(tiny)["quarantined"] = {number: "not finite"}
    own = tiny.positions_of(np.array([number]))
    found = PositionShuffle(tiny)
    assert np.array_equal(found(own), own)
    assert not np.isin(found(tiny.positions_of(tiny.sequences("train"))), own).any()


def test_a_split_that_is_mostly_one_sequence_cannot_be_exchanged(tmp_path):
    tiny = cache_of(tmp_path, [4, 4, 4, 4, 100])
    with pytest.raises(UsageError, match="most of its positions"):
        PositionShuffle(tiny)(tiny.positions_of(tiny.sequences("all")))
    with pytest.raises(UsageError, match="0 or more"):
        PositionShuffle(tiny, -1)
