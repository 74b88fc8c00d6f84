"""Caches in object stores: reads against zarr-python and bare requests; extraction against a disk.

    python benchmarks/stores.py                        # a mock of S3 on this machine
    python benchmarks/stores.py --server radosgw       # Ceph's gateway, where it is installed
    python benchmarks/stores.py --root s3://bucket/x   # a store of yours (AWS_* say which)

Reads: all rows of a float16 layer in steps of 16 MiB of float32, checked and decoded, against
zarr-python on the same store and against the same ranges with nothing done to them. Extraction: the
stories that come along, into the store and into a folder. Wall seconds, taking turns; the server
runs on the same cores.
"""

import argparse
import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from results import Figure, write_results

from residua import extract
from residua.cache.files.paths import as_path, store_of, upload_folder
from residua.cache.store.activation_cache import ActivationCache
from residua.sample import MODEL_DIR, TEXT_PATH
from residua.tests.support.servers import serving
from residua.tests.support.synthetic import make_cache, random_head


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", default="moto", choices=("moto", "radosgw", "swift"))
    parser.add_argument("--root", help="URL of an empty root, instead of a server of our own")
    parser.add_argument("--positions", type=int, default=1 << 16)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def wall_seconds(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall time of each work in every round, called in turn; a round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-1, rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def read_figures(root: Path, args: argparse.Namespace) -> list[Figure]:
    """Reads against zarr-python and against bare requests."""
    values = np.random.default_rng(0).standard_normal(
        (args.positions, args.d_model), dtype=np.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        made = make_cache(
            Path(folder), [values], [args.positions], random_head(args.d_model, 10),
            part_rows=16384, chunk_rows=2048,
        )  # fmt: skip
        upload_folder(made.path, root / made.id)
    path = root / made.id
    step = ActivationCache(path).block_rows()
    starts = range(0, args.positions, step)

    def ours() -> None:
        from residua.cache.format.remote_shard import FETCHED_CHUNKS

        FETCHED_CHUNKS.clear()
        array = ActivationCache(path).residual_array(0)
        for start in starts:
            array[start : start + step]

    def zarrs() -> None:
        array = ActivationCache(path).residual_array(0)._open_zarr()
        for start in starts:
            array[start : start + step].astype(np.float32)

    def bare() -> None:
        layout = ActivationCache(path).residual_array(0).layout
        store, key = store_of(path / "arrays.zarr" / "residual" / "0")
        per_shard = layout.shard_rows // layout.chunk_rows
        for start in starts:
            chunks = range(start // layout.chunk_rows, -(-(start + step) // layout.chunk_rows))
            keys = [f"{key}/{layout.shard_key(chunk // per_shard)}" for chunk in chunks]
            first = [chunk % per_shard * layout.chunk_bytes for chunk in chunks]
            store.cat_ranges(keys, first, [f + layout.chunk_bytes for f in first])

    found = wall_seconds({"ours": ours, "zarr": zarrs, "bare": bare}, args.rounds)
    size = f"{args.positions:,} x {args.d_model} float16, steps of 16 MiB, as float32"
    what = f"reads of {size}, from {args.root or args.server}"
    return [
        Figure("stores_zarr", what, "zarr-python", found["ours"], found["zarr"], clock="wall"),
        Figure(
            "stores_bare",
            what,
            "the requests alone, nothing decoded",
            found["ours"],
            found["bare"],
            clock="wall",
        ),
    ]


def extraction_figure(root: Path, args: argparse.Namespace) -> Figure:
    """The whole call into a store against the same into a folder."""

    def into(place: Path) -> None:
        fresh = place / uuid.uuid4().hex
        extract(MODEL_DIR, TEXT_PATH, root=fresh, max_tokens=args.tokens, part_positions=8192)

    with tempfile.TemporaryDirectory() as folder:
        works = {"ours": lambda: into(root), "theirs": lambda: into(Path(folder))}
        found = wall_seconds(works, args.rounds)
    what = (
        f"`residua.extract` into {args.root or args.server}, sample model, {args.tokens:,} tokens"
    )
    return Figure(
        "stores_extract",
        what,
        "the same into a folder",
        found["ours"],
        found["theirs"],
        clock="wall",
    )


def main() -> None:
    args = arguments()
    with contextlib.ExitStack() as stack:
        url = args.root
        if url is None:
            server = stack.enter_context(serving(args.server))
            os.environ |= server.environment()
            url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
        root = as_path(url)
        write_results(args.json, [*read_figures(root, args), extraction_figure(root, args)])


if __name__ == "__main__":
    main()
