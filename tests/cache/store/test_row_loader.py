"""Claims about the loader: every row once, one order per seed and epoch, resumable, bounded."""

import os
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from residua.cache.errors import (
    CorruptError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from residua.cache.format import shard as shard_module
from residua.cache.store import row_loader as row_loader_module
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.row_loader import BatchMemory, RowLoader
from residua.cache.store.row_runs import RowRuns

from ...support.forging import forge_sizes
from ...support.synthetic import make_cache, random_head

LENGTHS = np.random.default_rng(5).integers(1, 90, 60).tolist()
WIDTH = 4
SMALL: dict[str, Any] = {"batch_rows": 100, "buffer_rows": 256, "slab_rows": 16}

FORKS = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:This process:DeprecationWarning"
)
"""Few cores, and threads that other tests left, do not matter here."""


def cache_of_named_rows(root: Path, dtype: str = "float32") -> ActivationCache:
    """Layer l at position p is p, 10 p, 100 p, ... times l + 1, so that rows name themselves."""
    rows = np.arange(sum(LENGTHS), dtype=np.float32)[:, None]
    layers = [rows * np.array([layer + 1, 1, 0.5, -1], np.float32) for layer in range(3)]
    return make_cache(root, layers, LENGTHS, random_head(WIDTH, 11), dtype=dtype)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return cache_of_named_rows(tmp_path_factory.mktemp("root"))


def positions_in_order(batches: Any) -> list[int]:
    """Positions in the order in which they come, from batches of layer 0."""
    return [int(value) for batch in batches for value in batch[:, 1]]


def positions_of_split(cache: ActivationCache, split: str) -> list[int]:
    return cache.positions_of(cache.sequences(split)).tolist()


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_rows", [1, 100, 1000, 10**6])
def test_every_row_of_the_split_comes_once(cache, split, shuffle, batch_rows):
    options = {**SMALL, "batch_rows": batch_rows}
    batches = list(RowLoader(cache, 0, split=split, shuffle=shuffle, **options))
    rows = positions_in_order(batches)
    assert sorted(rows) == positions_of_split(cache, split)
    assert (rows == positions_of_split(cache, split)) == (not shuffle)
    assert {len(batch) for batch in batches[:-1]} <= {batch_rows}
    assert len(batches) == RowLoader(cache, 0, split=split, **options).batches()


def test_the_order_follows_from_seed_and_epoch_alone(cache):
    loader, twin = RowLoader(cache, 0, **SMALL), RowLoader(cache, 0, **SMALL)
    first = positions_in_order(loader)
    assert positions_in_order(twin) == first == positions_in_order(loader)
    loader.set_epoch(1)
    second = positions_in_order(loader)
    twin.set_epoch(1)
    assert positions_in_order(twin) == second != first
    assert positions_in_order(RowLoader(cache, 0, seed=1, **SMALL)) != first
    loader.set_epoch(0)
    assert positions_in_order(loader) == first


def test_neighbours_in_the_cache_do_not_stay_neighbours(cache):
    rows = np.array(positions_in_order(RowLoader(cache, 0, **SMALL)))
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.05


@FORKS
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_and_ranks_share_the_rows(cache, workers, world_size):
    rows = []
    for rank in range(world_size):
        loader = RowLoader(cache, 0, rank=rank, world_size=world_size, **SMALL)
        batches = list(DataLoader(loader, batch_size=None, num_workers=workers))
        assert len(batches) == loader.batches(max(1, workers))
        rows += positions_in_order(batches)
    assert sorted(rows) == positions_of_split(cache, "train")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [1, 4])
def test_with_drop_last_every_rank_gives_equally_many_full_batches(cache, world_size, workers):
    counts = set()
    for rank in range(world_size):
        loader = RowLoader(
            cache, 0, drop_last=True, rank=rank, world_size=world_size, **{**SMALL, "batch_rows": 9}
        )
        counts.add(loader.batches(workers))
        if workers == 1:
            batches = list(loader)
            assert len(batches) == loader.batches()
            assert {len(batch) for batch in batches} == {9}
            assert len(positions_in_order(batches)) == len(set(positions_in_order(batches)))
    assert len(counts) == 1


@FORKS
def test_workers_that_are_kept_see_the_next_epoch(cache):
    loader = RowLoader(cache, 0, **SMALL)
    persistent = DataLoader(loader, batch_size=None, num_workers=1, persistent_workers=True)
    first = positions_in_order(persistent)
    loader.set_epoch(1)
    assert positions_in_order(persistent) == positions_in_order(loader) != first


@pytest.mark.parametrize("after", [0, 1, 3, 7, 10_000])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_resumed_loader_goes_on_as_if_it_had_never_stopped(cache, after, drop_last):
    options: dict[str, Any] = {**SMALL, "drop_last": drop_last}
    whole = RowLoader(cache, 0, **options)
    whole.set_epoch(3)
    batches = list(whole)
    stopped = RowLoader(cache, 0, **options)
    stopped.set_epoch(3)
    for _ in zip(range(after), stopped, strict=False):
        pass
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    resumed = RowLoader(cache, 0, **options)
    resumed.load_state_dict(state)
    assert positions_in_order(resumed) == positions_in_order(batches[after:])
    assert resumed.state_dict()["batch"] == len(batches)
    assert positions_in_order(resumed) == positions_in_order(batches)


def test_a_state_of_another_loader_is_refused(cache):
    state = RowLoader(cache, 0, **SMALL).state_dict()
    with pytest.raises(MismatchError, match="seed was 0, is 2"):
        RowLoader(cache, 0, seed=2, **SMALL).load_state_dict(state)
    with pytest.raises(MismatchError, match=r"layers was \[0\], is \[0, 1\]"):
        RowLoader(cache, [0, 1], **SMALL).load_state_dict(state)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_in_the_dtype_that_was_asked_for(tmp_path, stored, dtype):
    cache = cache_of_named_rows(tmp_path, stored)
    loader: Any = RowLoader(cache, 1, shuffle=False, dtype=dtype, **SMALL)
    got = torch.cat(list(loader))
    want = torch.from_numpy(
        cache.residual_array(1)[cache.positions_of(cache.sequences("train"))]
    ).to(dtype)
    assert torch.equal(got, want)


def test_several_layers_are_stacked_row_by_row(cache):
    loader: Any = RowLoader(cache, (2, 0), **SMALL)
    batches = list(loader)
    rows = torch.cat(batches)
    assert rows.shape[1:] == (2, WIDTH)
    assert torch.equal(rows[:, 0, 0], 3 * rows[:, 1, 0])
    assert positions_in_order(batch[:, 1] for batch in batches) == positions_in_order(
        RowLoader(cache, 0, **SMALL)
    )
    one: Any = next(iter(RowLoader(cache, [1], **SMALL)))
    assert one.shape == (100, 1, WIDTH)


def test_tokens_come_with_their_rows(cache):
    ids = cache.tokens[:]
    loader: Any = RowLoader(cache, 0, with_tokens=True, **SMALL)
    for rows, tokens in loader:
        assert tokens.dtype == torch.int64
        np.testing.assert_array_equal(tokens, ids[rows[:, 1].int()])


def test_batches_own_their_memory(cache):
    loader = RowLoader(cache, 0, dtype=torch.float32, **SMALL)
    for batch in loader:
        assert isinstance(batch, torch.Tensor)
        batch.fill_(-1)
    assert sorted(positions_in_order(loader)) == positions_of_split(cache, "train")


def test_the_buffer_bounds_what_is_read_ahead(cache, monkeypatch):
    loader = RowLoader(cache, 0, **SMALL)
    sizes = [len(order) for _, order in loader._fillings(0, 1, 0)]
    assert max(sizes) <= 256
    assert sum(sizes) == len(positions_of_split(cache, "train"))


@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_from_buffers_are_those_gathered_from_the_maps(
    cache, monkeypatch, shuffle, with_tokens
):
    """Caches of more parts than maps stay open are read through buffers."""
    options = {**SMALL, "shuffle": shuffle, "with_tokens": with_tokens}
    from_maps: Any = list(RowLoader(cache, (0, 2), **options))
    monkeypatch.setattr(row_loader_module, "OPEN_SHARDS", 0)
    monkeypatch.setattr(row_loader_module, "MappedSlabs", None)
    from_buffers: Any = list(RowLoader(cache, (0, 2), **options))
    assert len(from_maps) == len(from_buffers)
    for a, b in zip(from_maps, from_buffers, strict=True):
        if with_tokens:
            assert torch.equal(a[1], b[1])
            a, b = a[0], b[0]
        assert torch.equal(a, b)


def test_few_bytes_are_gathered_at_a_time(cache, monkeypatch):
    batches: Any = list(RowLoader(cache, 0, **SMALL))
    monkeypatch.setattr(row_loader_module, "GATHER_BYTES", 7 * WIDTH * 4)
    in_pieces: Any = RowLoader(cache, 0, **SMALL)
    for a, b in zip(batches, in_pieces, strict=True):
        assert torch.equal(a, b)


def test_rows_that_wait_for_a_slow_consumer_are_read_with_care(tmp_path, monkeypatch):
    """A file that was cut gives no page, as a disk that fails: an error, and no killed process."""
    values = [np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)]
    cache = make_cache(tmp_path, values, [4096], random_head(64, 9), part_rows=4096, chunk_rows=512)
    batches = iter(RowLoader(cache, 0, split="all", batch_rows=64))
    next(batches)
    (shard,) = (cache.path / "arrays.zarr/residual/0/c").rglob("0/0")
    os.truncate(shard, 8192)
    monkeypatch.setattr(row_loader_module, "LOADED_SECONDS", -1.0)
    monkeypatch.setattr(shard_module, "LOADED_SECONDS", -1.0)
    with pytest.raises(CorruptError, match="cannot be read: the disk fails"):
        list(batches)


def test_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it():
    memory = BatchMemory()
    first = memory.empty((100, 3), torch.float32)
    first.fill_(1)
    address = first.data_ptr()
    assert address % 64 == 0
    view = first.numpy()[5:]  # keeps the memory
    del first
    second = memory.empty((100, 3), torch.float32)
    second.fill_(2)
    third = memory.empty((90, 2), torch.bfloat16)  # two blocks are in use
    third.fill_(3)
    assert (view == 1).all()
    assert (second == 2).all()
    del view
    addresses = {second.data_ptr(), third.data_ptr()}
    del second
    assert memory.empty((100, 3), torch.float32).data_ptr() in addresses
    assert (third == 3).all()
    assert memory.empty((0, 3), torch.float32).shape == (0, 3)


def test_a_loop_over_batches_uses_two_blocks_of_memory(cache):
    addresses = set()
    for batch in RowLoader(cache, 0, **SMALL):
        assert isinstance(batch, torch.Tensor)
        addresses.add(batch.data_ptr())
    assert len(addresses) == 2


def test_a_loader_travels_to_a_process_that_is_spawned(cache):
    loader = RowLoader(cache, 0, **SMALL)
    batches = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert positions_in_order(batches) == positions_in_order(loader)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"layer": 9}, NotFoundError, "layer 9 is not in this cache"),
        ({"layer": []}, UsageError, "no rows"),
        ({"split": "dev"}, UsageError, "no split 'dev'"),
        ({"batch_rows": 0}, UsageError, "batch_rows must be at least 1"),
        ({"rank": 2, "world_size": 2}, UsageError, r"rank must lie in 0\.\.1"),
        ({"seed": -1}, UsageError, "seed must be at least 0"),
    ],
)
def test_wrong_requests_are_refused(cache, wrong, error, message):
    with pytest.raises(error, match=message):
        RowLoader(cache, **{"layer": 0, **wrong})


def test_rows_of_a_forged_width_are_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    layers = [np.zeros((600, 16), np.float32)] * 2
    cache = make_cache(tmp_path, layers, [600], random_head(16, 9), dtype="float16")

    class WideRows(random.Random):
        """Draws the forged size."""

        def choice(self, seq: Any) -> Any:
            return "d_model" if "d_model" in seq else 1 << 20

    assert forge_sizes(cache.path, WideRows()) == "d_model is 1048576"
    loader = RowLoader(ActivationCache(cache.path), 1, split="all")
    assert loader.cache.d_model == 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError):
            next(iter(loader))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A row takes 2 MiB, the rows of the split 1.2 GiB.
    assert peak < 20 << 20


def test_an_unfinished_cache_is_refused(tmp_path):
    cache = cache_of_named_rows(tmp_path)
    (cache.path / "journal" / "00000001.json").unlink()
    with pytest.raises(IncompleteError):
        RowLoader(ActivationCache(cache.path), 0)


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_rows_of_the_sequences(cache, seed):
    rng = np.random.default_rng(seed)
    sequences = np.flatnonzero(rng.random(len(LENGTHS)) < 0.7)
    runs, rows = RowRuns.of(cache, sequences), cache.positions_of(sequences)
    assert len(runs) == len(rows)
    pieces = [np.arange(*piece) for piece in runs.pieces(50)]
    assert max(map(len, pieces)) <= 50
    np.testing.assert_array_equal(np.concatenate(pieces), rows)
    for start, stop in rng.integers(0, len(rows), (40, 2)).tolist():
        if start < stop:
            got = np.arange(len(rows) and cache.positions)[runs.positions(start, stop)]
            np.testing.assert_array_equal(got, rows[start:stop])
