"""Local reads of a cache against np.memmap of the same bytes, in one process, interleaved.

    python benchmarks/read.py
    python benchmarks/read.py --dtype bfloat16 --rounds 9

Three patterns: `sequential` (4096-row steps), `blocks` (128-row slabs in random order) and `rows`
(256 random rows at a time). *stored* delivers the bytes as they are kept, *float32* decodes them,
on both sides. `first` is the first epoch of a fresh reader, which checks every chunk's crc32c and
maps every page, against the first epoch of a fresh np.memmap; `later` are epochs after it. The
ratio is the best np.memmap round over the best of ours: 1.00 is as fast as np.memmap.
The last line is `RowLoader` (4096-row batches of shuffled rows as float32 tensors) against true
random 4096-row batches of np.memmap made float32 by torch, one thread each.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from residua.cache.format.array import CacheArray
from residua.cache.format.dtypes import decode_rows, encode_rows
from residua.cache.store.activation_cache import ActivationCache
from residua.tests.support.synthetic import make_cache, random_head

TARGETS = {"sequential": 0.80, "blocks": 0.80, "rows": 0.65}
STEP, SLAB, BATCH = 4096, 128, 256
Read = Callable[[Any], np.ndarray]
Source = Callable[[], Read]
"""Opens the file or array anew and returns what reads a slice or row numbers."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--positions", type=int, default=1 << 17)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--chunk-rows", type=int, default=2048)
    parser.add_argument("--part-rows", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to put the files; default: the temporary folder")
    return parser.parse_args()


def synthetic(root: Path, args: argparse.Namespace) -> ActivationCache:
    values = np.random.default_rng(0).standard_normal(
        (args.positions, args.d_model), dtype=np.float32
    )
    raw = encode_rows(values, args.dtype)
    raw.tofile(root / "raw.bin")
    return make_cache(
        root,
        [values],
        [args.positions],
        random_head(args.d_model, 10),
        dtype=args.dtype,
        part_rows=args.part_rows,
        chunk_rows=args.chunk_rows,
    )


def memmap(path: Path, array: CacheArray, stored: bool) -> Source:
    """np.memmap of `path`; both sides give an array of their own."""
    layout = array.layout

    def fresh() -> Read:
        rows = np.memmap(path, layout.stored_dtype, mode="r", shape=layout.shape)
        if stored:
            return lambda key: np.array(rows[key]) if isinstance(key, slice) else rows[key]
        if layout.logical_dtype == "float32":
            return lambda key: np.array(rows[key])
        return lambda key: decode_rows(rows[key], layout.logical_dtype)

    return fresh


def ours(path: Path, stored: bool) -> Source:
    def fresh() -> Read:
        array = CacheArray(path)

        def read(key: Any) -> np.ndarray:
            if isinstance(key, slice):
                reader = array.read_stored if stored else array.read
                return reader(key.start, key.stop)
            return array.take_stored(key) if stored else array.take(key)

        return read

    return fresh


def keys(pattern: str, positions: int, seed: int) -> Iterator[Any]:
    """What one epoch reads: slices, or arrays of row numbers."""
    rng = np.random.default_rng(seed)
    if pattern == "rows":
        order = rng.permutation(positions)
        yield from (order[i : i + BATCH] for i in range(0, positions, BATCH))
        return
    size = STEP if pattern == "sequential" else SLAB
    starts = np.arange(0, positions, size)
    if pattern == "blocks":
        rng.shuffle(starts)
    yield from (slice(int(i), min(int(i) + size, positions)) for i in starts)


def epoch(read: Read, wanted: list[Any]) -> float:
    start = time.perf_counter()
    for key in wanted:
        read(key)
    return time.perf_counter() - start


def measure(sources: tuple[Source, Source], pattern: str, args: argparse.Namespace) -> np.ndarray:
    """Best seconds, `(first or later, np.memmap or ours)`."""
    best = np.full((2, 2), np.inf)
    for number in range(args.rounds):
        wanted = list(keys(pattern, args.positions, number))
        reads = [source() for source in sources]
        for age in (0, 1, 1):
            for side, read in enumerate(reads):
                best[age, side] = min(best[age, side], epoch(read, wanted))
    return best


def loaders(cache: ActivationCache, path: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """One epoch of shuffled float32 batches: np.memmap, and ours."""
    import torch

    from residua.cache.store.row_loader import RowLoader

    torch.set_num_threads(1)
    layout = cache.residual_array(0).layout
    rows = np.memmap(path, layout.stored_dtype, mode="r", shape=layout.shape)
    bfloat16 = layout.logical_dtype == "bfloat16"
    order = np.random.default_rng(0).permutation(cache.positions)
    loader = RowLoader(cache, 0, split="all", batch_rows=STEP)

    def baseline() -> None:
        for start in range(0, len(order), STEP):
            found = rows[order[start : start + STEP]]
            signed = found.view(np.int16) if bfloat16 else found
            tensor = torch.from_numpy(signed)
            (tensor.view(torch.bfloat16) if bfloat16 else tensor).float()

    def ours() -> None:
        for _ in loader:
            pass

    return baseline, ours


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = synthetic(Path(folder), args)
        array = cache.residual_array(0)
        size = args.positions * array.layout.row_bytes
        print(f"{args.positions} x {args.d_model} {args.dtype}, {size / 1e6:.0f} MB, warm")
        print(f"{'':22s}{'first':>8s}{'later':>8s}{'target':>8s}   later, GB/s: memmap, ours")
        for pattern, target in TARGETS.items():
            for stored in (True, False):
                sources = memmap(Path(folder) / "raw.bin", array, stored), ours(array.path, stored)
                best = measure(sources, pattern, args)
                first, later = best[:, 0] / best[:, 1]
                rates = size / best[1] / 1e9
                name = f"{pattern}, {'stored' if stored else 'float32'}"
                print(f"{name:22s}{first:8.2f}{later:8.2f}{target:8.2f}   {rates.round(2)}")
        works = loaders(cache, Path(folder) / "raw.bin")
        seconds = np.array([[timed(work) for work in works] for _ in range(args.rounds)]).min(0)
        ratio, rates = seconds[0] / seconds[1], size / seconds / 1e9
        print(f"{'loader, float32':22s}{'':8s}{ratio:8.2f}{'':8s}   {rates.round(2)}")


if __name__ == "__main__":
    main()
