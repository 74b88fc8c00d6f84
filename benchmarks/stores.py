"""Caches in object stores: reads against zarr-python and bare requests; extraction against a disk.

    python benchmarks/stores.py                        # a mock of S3 on this machine
    python benchmarks/stores.py --server radosgw       # Ceph's gateway, where it is installed
    python benchmarks/stores.py --root s3://bucket/x   # a store of yours (AWS_* say which)

Reads: all rows of a float16 layer in steps of 16 MiB of float32, checked and decoded. `zarr` is
zarr-python on the same store, `bare` the same ranges with nothing done to them. Extraction: the
stories that come along, into the store and into a folder, interleaved. A ratio of 1.00 is as fast
as what it is compared with. The server runs on the same cores.
"""

import argparse
import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
    return parser.parse_args()


def seconds(*calls: Callable[[], object], rounds: int) -> list[float]:
    """Least wall time of each call, called in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for number, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[number] = min(best[number], time.perf_counter() - began)
    return best


def reads(root: Path, args: argparse.Namespace) -> None:
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
        from residua.cache.format import remote_shard as remoteshard

        remoteshard.forget()
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

    mine, theirs, least = seconds(ours, zarrs, bare, rounds=args.rounds)
    size = values.nbytes / 2 / 1e6
    print(f"reads, {size:.0f} MB: {theirs / mine:.2f} of zarr, {least / mine:.2f} of bare requests")


def extraction(root: Path, args: argparse.Namespace) -> None:
    def into(place: Path) -> None:
        fresh = place / uuid.uuid4().hex
        extract(MODEL_DIR, TEXT_PATH, root=fresh, max_tokens=args.tokens, part_positions=8192)

    with tempfile.TemporaryDirectory() as folder:
        there, here = seconds(
            lambda: into(root), lambda: into(Path(folder)), rounds=args.rounds
        )  # fmt: skip
    print(f"extraction of {args.tokens:,} tokens: {here / there:.2f} of a folder's throughput")


def main() -> None:
    args = arguments()
    with contextlib.ExitStack() as stack:
        url = args.root
        if url is None:
            server = stack.enter_context(serving(args.server))
            os.environ |= server.environment()
            url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
        root = as_path(url)
        reads(root, args)
        extraction(root, args)


if __name__ == "__main__":
    main()
