"""Compact caches against raw ones and against zarr-python, in one process, taking turns.

    python benchmarks/compact.py
    python benchmarks/compact.py --model sample/sample-neox --text sample/heldout.jsonl

Extracts the rows of a model's last layers once, then writes and reads them both ways, and reads
the compact files through zarr-python, with the same codecs. CPU seconds of one thread.
"""

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from results import Figure, take_turns, use_one_core, write_results

import residua
from residua.cache.format.array import CacheArray
from residua.cache.format.array_writer import create_residual
from residua.cache.format.compressed_shard import DECODED_CHUNKS, shard_writer_for
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--folder", help="where to put the files; default: the temporary folder")
    return parser.parse_args()


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


def figures_of(folder: Path, values: np.ndarray, dtype: str, rounds: int) -> list[Figure]:
    """Writing and reading of `values`, kept in `dtype`."""
    rows = encode_rows(values, dtype)
    layout = Layout.choose(rows.shape[1], rows.itemsize)
    stores = {codec: folder / f"{dtype}-{codec}" for codec in ("raw", "compact")}

    def write_anew(codec: str) -> None:
        shutil.rmtree(stores[codec], ignore_errors=True)
        write(stores[codec], rows, dtype, layout, codec)

    writes = take_turns({codec: partial(write_anew, codec) for codec in stores}, rounds)
    sizes = {
        codec: sum(file.stat().st_size for file in store.glob("**/c/*/0"))
        for codec, store in stores.items()
    }
    DECODED_CHUNKS.max_bytes = 8 << 20  # nothing of one epoch is left for the next
    arrays = {codec: CacheArray(store / "residual/0") for codec, store in stores.items()}
    for array in arrays.values():
        assert np.array_equal(array.read_stored(0, 100), rows[:100])
    works = {codec: partial(steps, array.read_stored, len(rows)) for codec, array in arrays.items()}
    works["zarr"] = partial(steps, through_zarr(stores["compact"] / "residual/0"), len(rows))
    reads = take_turns(works, rounds)
    size = f"{len(rows):,} x {rows.shape[1]} {dtype}, {STEP} rows in order"
    note = f"{sizes['raw'] / sizes['compact']:.2f} times fewer bytes"
    return [
        Figure(
            f"compact_write_{dtype}",
            f"writes of a compact array of {size}",
            "the same uncompressed",
            writes["compact"],
            writes["raw"],
            note,
        ),
        Figure(
            f"compact_read_{dtype}",
            f"reads of a compact array of {size}, as stored",
            "the same uncompressed",
            reads["compact"],
            reads["raw"],
        ),
        Figure(
            f"compact_zarr_{dtype}",
            f"reads of a compact array of {size}, as stored",
            "zarr-python, the same files",
            reads["compact"],
            reads["zarr"],
        ),
    ]


def main() -> None:
    args = arguments()
    use_one_core()
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        cache = residua.extract(
            args.model, args.text, root=folder, max_tokens=args.tokens, context=256,
            dtype="float32",
        )  # fmt: skip
        layers = [cache.residual_array(layer)[:] for layer in (cache.n_blocks // 2, cache.n_blocks)]
        values = np.concatenate(layers)
        for dtype in DTYPES:
            figures += figures_of(folder, values, dtype, args.rounds)
    write_results(args.json, figures)


if __name__ == "__main__":
    main()
