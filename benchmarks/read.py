"""Local reads of a cache against np.memmap of the same bytes, in one process, taking turns.

    python benchmarks/read.py
    python benchmarks/read.py --dtype bfloat16 --rounds 9

Three patterns: `sequential` (4096-row steps), `slabs` (128-row slabs in random order) and `rows`
(256 random rows at a time). *stored* delivers a copy of the bytes as they are kept; *float32*
decodes them, for the baseline by torch's `.float()`, the fastest conversion that a script has.
Epochs after the first are measured: the first also checks every chunk's crc32c. The last figure is
`RowLoader` (4096-row batches of shuffled rows as float32 tensors) against true random batches of
np.memmap made float32 by torch. CPU seconds of one thread.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, take_turns, use_one_core, write_results

from residua.cache.format.array import CacheArray
from residua.cache.format.dtypes import encode_rows
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.row_loader import RowLoader
from residua.tests.support.synthetic import make_cache, random_head

STEP, SLAB, BATCH = 4096, 128, 256
PATTERNS = {
    "sequential": f"{STEP} rows in order",
    "slabs": f"slabs of {SLAB} rows",
    "rows": f"{BATCH} random rows",
}
Read = Callable[[Any], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--positions", type=int, default=1 << 17)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--chunk-rows", type=int, default=2048)
    parser.add_argument("--part-rows", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
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


def memmap(path: Path, array: CacheArray, stored: bool) -> Read:
    """np.memmap of `path`; gives rows of its own, numpy's as stored or torch's float32."""
    layout = array.layout
    # Copy on write, so that torch takes the memory without a warning.
    rows = np.memmap(path, layout.stored_dtype, mode="c", shape=layout.shape)
    if stored:
        return lambda key: np.array(rows[key]) if isinstance(key, slice) else rows[key]
    if layout.logical_dtype == "float32":
        return lambda key: torch.from_numpy(np.array(rows[key]))
    dtype = getattr(torch, layout.logical_dtype)
    bits = rows.view(np.int16)
    return lambda key: torch.from_numpy(bits[key]).view(dtype).float()


def ours(cache: ActivationCache, stored: bool) -> Read:
    array = ActivationCache(cache.path).residual_array(0)

    def read(key: Any) -> np.ndarray:
        if isinstance(key, slice):
            reader = array.read_stored if stored else array.read
            return reader(key.start, key.stop)
        return array.take_stored(key) if stored else array.take(key)

    return read


def keys(pattern: str, positions: int, seed: int) -> Iterator[Any]:
    """What one epoch reads: slices, or arrays of row numbers."""
    rng = np.random.default_rng(seed)
    if pattern == "rows":
        order = rng.permutation(positions)
        yield from (order[i : i + BATCH] for i in range(0, positions, BATCH))
        return
    size = STEP if pattern == "sequential" else SLAB
    starts = np.arange(0, positions, size)
    if pattern == "slabs":
        rng.shuffle(starts)
    yield from (slice(int(i), min(int(i) + size, positions)) for i in starts)


def read_all(read: Read, wanted: list[Any]) -> None:
    for key in wanted:
        read(key)


def loader_works(cache: ActivationCache, path: Path) -> dict[str, Callable[[], None]]:
    """One epoch of shuffled float32 batches: ours, and np.memmap; a batch lives until the next."""
    read = memmap(path, cache.residual_array(0), stored=False)
    loader = RowLoader(cache, 0, split="all", batch_rows=STEP)
    rng = np.random.default_rng(0)

    def load() -> None:
        for _ in loader:
            pass

    def load_memmap() -> None:
        order = rng.permutation(cache.positions)
        for _ in map(read, (order[row : row + STEP] for row in range(0, len(order), STEP))):
            pass

    return {"ours": load, "theirs": load_memmap}


def main() -> None:
    args = arguments()
    use_one_core()
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = synthetic(Path(folder), args)
        array, raw = cache.residual_array(0), Path(folder) / "raw.bin"
        size = f"{args.positions:,} x {args.d_model} {args.dtype}"
        for pattern, steps in PATTERNS.items():
            wanted = list(keys(pattern, args.positions, 0))
            for kind, baseline in (("stored", "np.memmap"), ("float32", "np.memmap, `.float()`")):
                is_stored = kind == "stored"
                reads = {
                    "ours": ours(cache, is_stored),
                    "theirs": memmap(raw, array, is_stored),
                }
                works = {side: partial(read_all, read, wanted) for side, read in reads.items()}
                # The first epoch, which checks checksums and maps pages, is not counted.
                seconds = take_turns(works, args.rounds)
                key, what = f"read_{pattern}_{kind}", f"reads of {size}, {steps}, as {kind}"
                figures.append(Figure(key, what, baseline, seconds["ours"], seconds["theirs"]))
        seconds = take_turns(loader_works(cache, raw), args.rounds)
        figures.append(
            Figure(
                "read_loader",
                f"`RowLoader` of {size}, float32 batches of {STEP}",
                "np.memmap, random rows, `.float()`",
                seconds["ours"],
                seconds["theirs"],
            )
        )
    write_results(args.json, figures)


if __name__ == "__main__":
    main()
