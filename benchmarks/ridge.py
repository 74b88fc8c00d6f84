"""Ridge out of core from a cache against scikit-learn in memory, on the same folds and penalties.

    python benchmarks/ridge.py
    python benchmarks/ridge.py --d-model 768 --positions 100000 --no-grid

Three things, each beside its baseline in the same run:

- the pass that collects moments, against the same products of numpy on float32 blocks in memory,
  and against the rate of `x.T @ x` alone; by CPU time, in one thread;
- the whole fit (every layer and offset: the cross-validated error of 19 penalties, and the map
  with the best one), against `RidgeCV` in memory with the same folds and penalties, and against
  one `Ridge` per layer and offset with the penalty known; residua runs one task per core, so on
  an idle machine give scikit-learn `--blas CORES`;
- peak memory of a process that fits the cache and one of four times the rows: what is private,
  and with the pages of mapped files, which the kernel takes back when others need memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import PredefinedSplit
from threadpoolctl import threadpool_limits

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.resources import available_cores
from residua.probes.moments.moment_collection import collect_passes
from residua.probes.moments.pass_plan import BLOCK_ROWS, MomentRequest
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.tests.support.synthetic import make_cache, random_head

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
CHILD = """
import json, sys, threading
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.ridge.ridge_probe import RidgeProbe
peaks, done = {"RssAnon": 0, "VmHWM": 0}, threading.Event()
def watch():
    while not done.wait(0.01):
        for line in open("/proc/self/status"):
            name = line.split(":")[0]
            if name in peaks:
                peaks[name] = max(peaks[name], int(line.split()[1]) * 1024)
threading.Thread(target=watch, daemon=True).start()
source = ActivationCache(sys.argv[1])
RidgeProbe(range(int(sys.argv[2])), products=sys.argv[3]).fit(source, memory=256 << 20, keep=False)
done.set()
print(json.dumps(peaks))
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--positions", type=int, default=32_000)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--offsets", type=int, default=2, help="offsets 0 to this, exclusive")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--products", default="float32", choices=("float64", "float32"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the pass, the best counts")
    parser.add_argument("--blas", type=int, default=1, help="BLAS threads of scikit-learn")
    parser.add_argument("--only-memory", action="store_true", help="leave out all timings")
    parser.add_argument("--no-grid", action="store_true", help="leave out the slow baseline")
    return parser.parse_args()


def synthetic(root: Path, args: argparse.Namespace, times: int = 1) -> ActivationCache:
    """Layers that share a signal, under noise, kept in float16."""
    rng = np.random.default_rng(0)
    lengths = [args.sequence] * (times * args.positions // args.sequence)
    signal = rng.normal(size=(sum(lengths), args.d_model)).astype(np.float32)
    layers = []
    for _ in range(args.layers):
        mixing = rng.normal(size=(args.d_model, args.d_model)).astype(np.float32)
        noise = rng.normal(0, 8, signal.shape).astype(np.float32)
        layers.append(signal @ mixing + noise)
    head = random_head(args.d_model, 100)
    return make_cache(
        root, layers, lengths, head, dtype="float16", part_rows=1 << 14, chunk_rows=1 << 10
    )


def in_memory(cache: ActivationCache, layer: int, offset: int, folds: int) -> Rows:
    """Pairs and folds of the train split as float64 rows, ready for scikit-learn."""
    split = cache.sequences("train")
    lengths = cache.sequence_length[split]
    rows = cache.positions_of(split)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows)) - 1
    fold = np.repeat(cache.sequence_folds(folds)[split], lengths)
    keep = left >= offset
    x, y = (cache.residual_array(n)[:].astype(np.float64) for n in (layer, cache.n_blocks))
    return x[rows[keep]], y[rows[keep] + offset], fold[keep]


def measure(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `work`, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    found = work()
    return found, time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def efficiency(cache: ActivationCache, args: argparse.Namespace) -> None:
    """CPU time of one pass over all layers and offsets, and of its products in memory."""
    asked = MomentRequest.of(
        cache, None, range(args.offsets), None, folds=args.folds, split="all",
        products=args.products,
    )  # fmt: skip
    rng, width = np.random.default_rng(0), cache.d_model
    blocks = [rng.normal(size=(BLOCK_ROWS, width)).astype(args.products) for _ in range(4)]
    count = cache.positions // BLOCK_ROWS

    def whole() -> None:
        for _ in collect_passes(cache, asked, memory=8 << 30, tasks=1):
            pass

    def products() -> None:
        for number in range(count * len(asked.layers)):
            x = blocks[number % 4]
            x.T @ x
            for offset in range(args.offsets):
                x.T @ blocks[(number + 1 + offset % 3) % 4]

    def square() -> None:
        for number in range(count * len(asked.layers)):
            x = blocks[number % 4]
            x.T @ x

    best = {}
    with threadpool_limits(1, user_api="blas"):
        for _ in range(args.rounds):
            for work in (whole, products, square):
                best[work] = min(measure(work)[2], best.get(work, np.inf))
    # A symmetric product is half of a general one.
    flops = cache.positions * len(asked.layers) * width**2
    share = count * BLOCK_ROWS / cache.positions
    pass_rate = flops * (1 + 2 * args.offsets) / best[whole] / 1e9
    square_rate = share * flops / best[square] / 1e9
    memory_rate = share * flops * (1 + 2 * args.offsets) / best[products] / 1e9
    print(
        f"pass, {args.products}   {best[whole]:8.2f} s CPU {pass_rate:7.1f} GFLOP/s   "
        f"of the same products in memory ({memory_rate:.1f}): {pass_rate / memory_rate:.2f}   "
        f"of x.T @ x ({square_rate:.1f}): {pass_rate / square_rate:.2f}"
    )


def cross_validated(rows: dict[tuple[int, int], Rows], probe: RidgeProbe) -> dict[Any, Any]:
    """scikit-learn's search over the penalties that the probe tried, on its folds."""
    return {
        pair: RidgeCV(probe.alphas_[pair], cv=PredefinedSplit(fold)).fit(x, y)
        for pair, (x, y, fold) in rows.items()
    }


def single(rows: dict[tuple[int, int], Rows], probe: RidgeProbe) -> dict[Any, Any]:
    """One scikit-learn fit per pair with the penalty that the probe chose."""
    return {p: Ridge(alpha=probe.alpha_[p]).fit(x, y) for p, (x, y, _) in rows.items()}


def difference(probe: RidgeProbe, models: dict[Any, Any]) -> float:
    """Largest difference of coefficients, relative to the largest coefficient."""
    worst = 0.0
    for pair, model in models.items():
        gap = np.abs(probe.maps_[pair].weight.T - model.coef_).max()
        worst = max(worst, float(gap / np.abs(model.coef_).max()))
    return worst


def against_sklearn(cache: ActivationCache, args: argparse.Namespace) -> None:
    """Time of the whole fit, and of scikit-learn's on the same rows in memory."""
    probe = RidgeProbe(range(args.offsets), folds=args.folds, products=args.products)
    RidgeProbe(0, [0], alpha=1.0, folds=1).fit(cache, keep=False)  # imports and page cache
    _, wall, cpu = measure(lambda: probe.fit(cache, keep=False))
    pairs = [(la, n) for la in cache.layers for n in range(args.offsets)]
    rows = {pair: in_memory(cache, *pair, args.folds) for pair in pairs}
    print(f"residua, out of core   {wall:8.2f} s wall {cpu:8.2f} s CPU")
    runs = {"sklearn, penalty known": single}
    if not args.no_grid:
        runs["sklearn, RidgeCV"] = cross_validated
    for name, run in runs.items():
        with threadpool_limits(args.blas, user_api="blas"):
            models, other_wall, other_cpu = measure(lambda run=run: run(rows, probe))
        print(
            f"{name:22s} {other_wall:8.2f} s wall {other_cpu:8.2f} s CPU   "
            f"ratio {other_wall / wall:6.1f} wall {other_cpu / cpu:6.1f} CPU   "
            f"coefficients differ by {difference(probe, models):.1e}"
        )


def memory(args: argparse.Namespace) -> None:
    """Peak memory of fits of n and 4n rows, each in a process of its own.

    Both have enough rows for full blocks in every fold of every task.
    """
    args.positions = max(args.positions, 2 * available_cores() * args.folds * BLOCK_ROWS)
    peaks = {}
    for times in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            cache = synthetic(Path(folder), args, times)
            command = [sys.executable, "-c", CHILD, cache.path, args.offsets, args.products]
            done = subprocess.run(
                list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True
            )
            peaks[times] = json.loads(done.stdout)
            print(
                f"peak memory, {cache.positions:8d} rows ({cache.bytes / 1e6:6.1f} MB): "
                f"{peaks[times]['RssAnon'] / 1e6:6.1f} MB private, "
                f"{peaks[times]['VmHWM'] / 1e6:6.1f} MB with mapped files"
            )
    print(f"private memory at 4x the rows: {peaks[4]['RssAnon'] / peaks[1]['RssAnon']:.3f} x")


def main() -> None:
    args = arguments()
    print(
        f"{args.layers} layers x {args.offsets} offsets, {args.positions} positions x "
        f"{args.d_model}, {args.folds} folds"
    )
    if not args.only_memory:
        with tempfile.TemporaryDirectory() as folder:
            cache = synthetic(Path(folder), args)
            efficiency(cache, args)
            against_sklearn(cache, args)
    memory(args)


if __name__ == "__main__":
    main()
