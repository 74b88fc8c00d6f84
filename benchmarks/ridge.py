"""Ridge out of core from a cache against scikit-learn in memory, on the same folds and penalties.

    python benchmarks/ridge.py --d-model 256 --positions 40000

Both give, for every layer and offset, the cross-validated error of 19 penalties and the fit with
the best one. Also timed: one scikit-learn `Ridge` per layer and offset with the penalty known.
residua runs one task per core; on an idle machine compare its wall with `--blas CORES`, on a busy
one compare CPU seconds (several BLAS threads then spend most of their time waiting).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from threadpoolctl import threadpool_limits

from residua.cache.store import ActivationCache
from residua.cache.tokens import folds_of
from residua.probes.ridge import RidgeProbe
from residua.tests.synthetic import make_cache, random_head

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--positions", type=int, default=8_000)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--offsets", type=int, default=2, help="offsets 0 to this, exclusive")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--products", default="float64", choices=("float64", "float32"))
    parser.add_argument("--memory", type=int, default=None, help="budget in bytes")
    parser.add_argument("--blas", type=int, default=1, help="BLAS threads of scikit-learn")
    parser.add_argument("--no-grid", action="store_true", help="leave out the slow baseline")
    return parser.parse_args()


def synthetic(root: Path, args: argparse.Namespace) -> ActivationCache:
    """Layers that share a signal, under float32 noise."""
    rng = np.random.default_rng(0)
    lengths = [args.sequence] * (args.positions // args.sequence)
    signal = rng.normal(size=(sum(lengths), args.d_model)).astype(np.float32)
    layers = []
    for _ in range(args.layers):
        mixing = rng.normal(size=(args.d_model, args.d_model)).astype(np.float32)
        noise = rng.normal(0, 8, signal.shape).astype(np.float32)
        layers.append(signal @ mixing + noise)
    head = random_head(args.d_model, 100)
    return make_cache(root, layers, lengths, head, part_rows=1 << 14, chunk_rows=1 << 10)


def in_memory(cache: ActivationCache, layer: int, offset: int, folds: int) -> Rows:
    """Pairs and folds of the train split as float64 rows, ready for scikit-learn."""
    split = cache.split("train")
    lengths = cache.sequence_length[split]
    rows = cache.rows(split)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows)) - 1
    fold = np.repeat(folds_of(cache.sequence_hash[split], folds), lengths)
    keep = left >= offset
    x, y = (cache.layer(n)[:].astype(np.float64) for n in (layer, cache.depth))
    return x[rows[keep]], y[rows[keep] + offset], fold[keep]


def measure(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `work`, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    found = work()
    return found, time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def grid_search(rows: dict[tuple[int, int], Rows], probe: RidgeProbe) -> dict[Any, Any]:
    """scikit-learn's search over the penalties that the probe tried."""
    out = {}
    for pair, (x, y, fold) in rows.items():
        search = GridSearchCV(
            Ridge(),
            {"alpha": probe.alphas_[pair]},
            cv=PredefinedSplit(fold),
            scoring="neg_mean_squared_error",
        )
        out[pair] = search.fit(x, y).best_estimator_
    return out


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


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        cache = synthetic(Path(folder), args)
        probe = RidgeProbe(range(args.offsets), folds=args.folds, products=args.products)
        RidgeProbe(0, [0], alpha=1.0, folds=1).fit(cache)  # imports and page cache
        _, wall, cpu = measure(lambda: probe.fit(cache, memory=args.memory))
        pairs = [(la, n) for la in cache.layers for n in range(args.offsets)]
        rows = {pair: in_memory(cache, *pair, args.folds) for pair in pairs}
    print(f"{len(rows)} pairs, {args.positions} positions x {args.d_model}, {args.folds} folds")
    print(f"residua, out of core   {wall:8.2f} s wall {cpu:8.2f} s CPU")
    runs = {"sklearn, penalty known": single}
    if not args.no_grid:
        runs["sklearn, grid search"] = grid_search
    for name, run in runs.items():
        with threadpool_limits(args.blas, user_api="blas"):
            models, other_wall, other_cpu = measure(lambda run=run: run(rows, probe))
        print(
            f"{name:22s} {other_wall:8.2f} s wall {other_cpu:8.2f} s CPU   "
            f"ratio {other_wall / wall:6.1f} wall {other_cpu / cpu:6.1f} CPU   "
            f"coefficients differ by {difference(probe, models):.1e}"
        )


if __name__ == "__main__":
    main()
