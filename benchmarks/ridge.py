"""Ridge out of core from a cache against scikit-learn in memory, on the same folds and penalties.

    python benchmarks/ridge.py
    python benchmarks/ridge.py --d-model 768 --positions 100000 --no-grid

Three things, each beside its baseline in the same run:

- the pass that collects moments, against the same products of numpy on float32 blocks in memory,
  and against the rate of `x.T @ x` alone; by CPU time, in one thread;
- the whole fit (every layer and offset: the cross-validated error of 19 penalties, and the map
  with the best one), in CPU seconds of one thread, against five baselines on float64 rows in
  memory: numpy, with moments per fold and one eigendecomposition per fold, which is what residua
  does out of core; the same with the reading of the rows; `RidgeCV`'s default, generalised
  cross-validation, which gives every row its own fold; `RidgeCV` with the same folds, which solves
  anew for each fold and penalty; and one `Ridge` with the penalty known;
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
from results import Figure, take_turns, use_one_core, write_results
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
    parser.add_argument("--products", default="float64", choices=("float64", "float32"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the pass, the best counts")
    parser.add_argument("--fits", type=int, default=3, help="rounds of the whole fits")
    parser.add_argument("--json", type=Path, help="file to write the figures of the fits to")
    parser.add_argument("--only-fits", action="store_true", help="leave out pass and memory")
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


def numpy_path(x: np.ndarray, y: np.ndarray, fold: np.ndarray, alphas: np.ndarray) -> Any:
    """The best penalty by held-out squared error and its coefficients `(d, targets)`, by numpy.

    Moments are summed per fold; the rows of all other folds are the total less the fold's.
    """
    moments = []
    for number in range(fold.max() + 1):
        a, b = x[fold == number], y[fold == number]
        sums = np.r_[len(a), a.sum(0)], b.sum(0)
        moments.append([*sums, a.T @ a, a.T @ b, np.array((b * b).sum())])
    total = [sum(parts) for parts in zip(*moments, strict=True)]

    def decompose(rest: list[Any]) -> tuple[np.ndarray, ...]:
        count, mean_x, mean_y = rest[0][0], rest[0][1:] / rest[0][0], rest[1] / rest[0][0]
        values, vectors = np.linalg.eigh(rest[2] - count * np.outer(mean_x, mean_x))
        return (
            mean_x,
            mean_y,
            values,
            vectors,
            vectors.T @ (rest[3] - count * np.outer(mean_x, mean_y)),
        )

    errors = np.zeros(len(alphas))
    for held in moments:
        rest = [t - h for t, h in zip(total, held, strict=True)]
        mean_x, mean_y, values, vectors, cross = decompose(rest)
        count, sum_x, sum_y = held[0][0], held[0][1:], held[1]
        # Held-out moments about the means of the other folds.
        xx = held[2] - np.outer(sum_x, mean_x) - np.outer(mean_x, sum_x - count * mean_x)
        xy = held[3] - np.outer(sum_x, mean_y) - np.outer(mean_x, sum_y - count * mean_y)
        yy = held[4] - 2 * sum_y @ mean_y + count * mean_y @ mean_y
        quadratic = (vectors.T @ xx @ vectors) * (cross @ cross.T)
        linear = (cross * (vectors.T @ xy)).sum(1)
        for index, alpha in enumerate(alphas):
            shrink = 1 / (values + alpha)
            errors[index] += yy - 2 * shrink @ linear + shrink @ quadratic @ shrink
    alpha = alphas[errors.argmin()]
    _, _, values, vectors, cross = decompose(total)
    return alpha, vectors @ (cross / (values + alpha)[:, None])


def difference(probe: RidgeProbe, coefficients: dict[Any, np.ndarray]) -> float:
    """Largest difference of coefficients `(d, targets)`, relative to the largest one."""
    return max(
        float(np.abs(probe.maps_[pair].weight - other).max() / np.abs(other).max())
        for pair, other in coefficients.items()
    )


def fits(cache: ActivationCache, args: argparse.Namespace) -> list[Figure]:
    """The whole fit against each baseline on the same rows in memory."""
    pairs = [(la, n) for la in cache.layers for n in range(args.offsets)]
    rows = {pair: in_memory(cache, *pair, args.folds) for pair in pairs}
    probe = RidgeProbe(range(args.offsets), folds=args.folds, products=args.products)
    probe.fit(cache, keep=False)
    found: dict[str, dict[Any, Any]] = {}

    def numpy_fits() -> None:
        found["numpy"] = {
            pair: numpy_path(x, y, fold, np.asarray(probe.alphas_[pair]))[1]
            for pair, (x, y, fold) in rows.items()
        }

    def numpy_reads_and_fits() -> None:
        for pair in pairs:
            x, y, fold = in_memory(cache, *pair, args.folds)
            numpy_path(x, y, fold, np.asarray(probe.alphas_[pair]))

    def gcv() -> None:
        for pair, (x, y, _) in rows.items():
            RidgeCV(probe.alphas_[pair]).fit(x, y)

    def grid() -> None:
        found["grid"] = {
            pair: np.transpose(
                RidgeCV(probe.alphas_[pair], cv=PredefinedSplit(fold)).fit(x, y).coef_
            )
            for pair, (x, y, fold) in rows.items()
        }

    def known() -> None:
        found["known"] = {
            pair: np.transpose(Ridge(alpha=probe.alpha_[pair]).fit(x, y).coef_)
            for pair, (x, y, _) in rows.items()
        }

    baselines = {
        "numpy": (numpy_fits, "numpy, moments and `eigh` per fold"),
        "read": (numpy_reads_and_fits, "the same, after reading the rows"),
        "gcv": (gcv, "`RidgeCV`, its default (other folds)"),
        "grid": (grid, "`RidgeCV`, the same folds"),
        "known": (known, "`Ridge`, penalty known"),
    }
    if args.no_grid:
        del baselines["grid"]
    size = f"{len(next(iter(rows.values()))[0]):,} rows x {args.d_model}"
    what = f"ridge, {len(pairs)} x {size}, {args.folds} folds, 19 penalties, rows from the cache"
    figures = []
    with threadpool_limits(1, user_api="blas"):
        for name, (work, words) in baselines.items():
            works = {"ours": lambda: probe.fit(cache, keep=False), "theirs": work}
            seconds = take_turns(works, args.fits, warm=name != "grid")
            note = (
                f"coefficients differ by {difference(probe, found[name]):.0e}"
                if name in found
                else ""
            )
            figures.append(
                Figure(f"ridge_{name}", what, words, seconds["ours"], seconds["theirs"], note)
            )
    return figures


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
            if not args.only_fits:
                efficiency(cache, args)
            use_one_core()
            write_results(args.json, fits(cache, args))
    if not args.only_fits:
        memory(args)


if __name__ == "__main__":
    main()
