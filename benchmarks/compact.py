"""Compact caches against raw ones and against zarr-python, in one process, interleaved.

    python benchmarks/compact.py
    python benchmarks/compact.py --model sample/sample-neox --text sample/heldout.jsonl

Extracts the rows of a model's last layers once, then writes and reads them both ways. `saved` is
raw over compact bytes; the other figures are CPU seconds of this process per GB of rows (one
thread, best of the rounds), each beside what it is compared with.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import residua
from residua.cache.format.array import CacheArray
from residua.cache.format.array_writer import create_residual
from residua.cache.format.compressed_shard import RECENT, shard_writer_for
from residua.cache.format.dtypes import encode_rows
from residua.cache.format.layout import Layout
from residua.sample import MODEL_DIR, TEXT_PATH

STEP = 4096
DTYPES = ("float16", "bfloat16", "float32")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--text", default=str(TEXT_PATH))
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to put the files; default: the temporary folder")
    return parser.parse_args()


def cpu(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def write(store: Path, rows: np.ndarray, dtype: str, layout: Layout, codec: str) -> None:
    array = create_residual(store, 0, len(rows), rows.shape[1], dtype, layout, codec)
    for part in range(layout.parts(len(rows))):
        start, stop = layout.rows(part, len(rows))
        path = store / "residual/0" / array.shard_key(part)
        writer = shard_writer_for(path, array, stop - start)
        for row in range(start, stop, STEP):
            writer.write(row - start, rows[row : min(row + STEP, stop)])
        writer.commit()


def steps(read: Callable[[int, int], Any], rows: int) -> None:
    for start in range(0, rows, STEP):
        read(start, min(start + STEP, rows))


def through_zarr(path: Path) -> Callable[[int, int], Any]:
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array: Any = zarr.open_array(path, mode="r")
    return lambda start, stop: array[start:stop]


def measure(folder: Path, values: np.ndarray, dtype: str, rounds: int) -> None:
    rows = encode_rows(values, dtype)
    layout = Layout.choose(rows.shape[1], rows.itemsize)
    best: dict[str, float] = {}

    def book(name: str, work: Callable[[], None]) -> None:
        best[name] = min(best.get(name, np.inf), cpu(work) / (rows.nbytes / 1e9))

    for number in range(rounds):
        for codec in ("raw", "compact"):
            store = folder / f"{dtype}-{codec}-{number}"
            book(f"write {codec}", lambda s=store, c=codec: write(s, rows, dtype, layout, c))
            path = store / "residual/0"
            array = CacheArray(path)
            RECENT.limit = 8 << 20  # nothing of one epoch is left for the next
            book(f"read {codec}", lambda a=array: steps(a.read_stored, len(rows)))
            api = through_zarr(path)
            book(f"zarr {codec}", lambda r=api: steps(r, len(rows)))
            assert np.array_equal(array.read_stored(0, 100), rows[:100])
    sizes = {codec: sum(f.stat().st_size for f in folder.glob(f"{dtype}-{codec}-0/**/c/*/0"))
             for codec in ("raw", "compact")}  # fmt: skip
    print(f"{dtype:9s} saved {sizes['raw'] / sizes['compact']:5.2f}   "
          f"write {best['write raw']:.2f} -> {best['write compact']:.2f}   "
          f"read {best['read raw']:.2f} -> {best['read compact']:.2f}   "
          f"zarr-python {best['zarr compact']:.2f} "
          f"({best['zarr compact'] / best['read compact']:.1f} x ours)")  # fmt: skip


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        cache = residua.extract(
            args.model, args.text, root=folder, max_tokens=args.tokens, context=256,
            dtype="float32",
        )  # fmt: skip
        layers = [cache.residual_array(layer)[:] for layer in (cache.n_blocks // 2, cache.n_blocks)]
        values = np.concatenate(layers)
        print(f"{len(values)} x {cache.d_model}, CPU s/GB, raw -> compact")
        for dtype in DTYPES:
            measure(folder, values, dtype, args.rounds)


if __name__ == "__main__":
    main()
