"""Vocabulary probes from a cache against plain torch and scikit-learn on the same rows in RAM.

    python benchmarks/vocab.py

Plain: `nn.Linear` from zero on standardised rows, `cross_entropy` and AdamW with a cosine decay, as
many epochs as ours, rows and labels held in RAM; the best of several learning rates, of which one
run is timed, and reading the rows is not. Ours reads the cache, computes the labels from it, tries
learning rates and validates, and all of that is timed. Every run is a process of its own; held-out
CE is that of the test split, memory the growth of the peak of anonymous memory over what imports
and the open cache take.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, use_one_core, write_results
from torch import Tensor
from torch.nn import functional as F

import residua
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training.minibatches import MinibatchStream
from residua.probes.training.softmax_loss import ModelDistribution, row_tiles
from residua.probes.vocabulary.parametrizations import apply_parametrization
from residua.probes.vocabulary.vocab_probe import VocabProbe
from residua.sample import MODEL_DIR

HELD_OUT = 16384
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates of the plain run."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="a cache [default: the sample model's]")
    parser.add_argument("--positions", type=int, default=400_000)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--offset", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="*", help="of the run of all [default: all]")
    parser.add_argument("--offsets", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--plain-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all runs")
    parser.add_argument("--classes", type=int, default=16, help="vocabulary of SGDClassifier's run")
    parser.add_argument("--only", nargs="*", default=["plain", "one", "all", "sklearn"])
    parser.add_argument("--rates", type=float, nargs="*", default=RATES, help="of the plain run")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def sample_cache(folder: Path, positions: int) -> ActivationCache:
    """The package's model on the sources of the standard library."""
    texts = folder / "texts.jsonl"
    with open(texts, "w") as out:
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = file.read_text(errors="ignore")
            for start in range(0, len(text), 3000):
                out.write(json.dumps({"text": text[start : start + 3000]}) + "\n")
    return residua.extract(
        str(MODEL_DIR), str(texts), root=folder, context=256, max_tokens=positions
    )


def rows_of(
    cache: ActivationCache, layer: int, offset: int, split: str, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """States and the model's top tokens of a split, in RAM."""
    teacher = ModelDistribution(cache.head.torch())
    feed = MinibatchStream(cache, [layer], [offset], split=split, max_positions=most, shuffle=False)
    x, y = torch.empty(feed.positions, cache.d_model), torch.empty(feed.positions, dtype=torch.long)
    filled = 0
    for draw in feed:
        ahead = draw.ahead[offset]
        assert ahead.residual is not None
        count = int(ahead.valid.sum())
        x[filled : filled + count] = draw.hidden[layer][ahead.valid]
        token = teacher.tokens(ahead.residual[ahead.valid]).token
        assert token is not None
        y[filled : filled + count] = token
        filled += count
    return x[:filled], y[:filled]


def held_out(cache: ActivationCache, layer: int, offset: int, logits: Any) -> float:
    """Mean cross-entropy on the test split, nats."""
    x, y = rows_of(cache, layer, offset, "test", HELD_OUT)
    total = sum(
        float(F.cross_entropy(logits(x[tile]), y[tile], reduction="sum"))
        for tile in row_tiles(len(x), cache.vocab)
    )
    return total / len(x)


class Meter:
    """Wall and CPU seconds, and growth of the peak of anonymous memory in MiB.

    Pages of the memory-mapped cache are the system's, which takes them back when it wants to.
    """

    def __init__(self) -> None:
        self.base = self.peak = self.anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        self.restart_clock()

    def restart_clock(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.anonymous())

    def read(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.done.set()
        self.thread.join()
        return {"wall": wall, "cpu": cpu, "mib": (self.peak - self.base) / 1024}

    @staticmethod
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def plain(cache: ActivationCache, args: argparse.Namespace) -> dict[str, Any]:
    """What one would write first."""
    meter = Meter()
    x, y = rows_of(cache, args.layer, args.offset, "train")
    torch.manual_seed(0)
    model = torch.nn.Linear(cache.d_model, cache.vocab)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    steps = args.plain_epochs * (len(x) // 1024)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    meter.restart_clock()
    x = (x - mean) / std
    for _ in range(args.plain_epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - 1023, 1024):
            rows = order[start : start + 1024]
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            decay.step()
    found = meter.read()
    with torch.no_grad():
        ce = held_out(cache, args.layer, args.offset, lambda rows: model((rows - mean) / std))
        return {**found, "ce": ce, "probes": 1}


def one(cache: ActivationCache, args: argparse.Namespace) -> dict[str, Any]:
    """One probe, read from the cache."""
    return ours(cache, args, [args.layer], [args.offset])


def every(cache: ActivationCache, args: argparse.Namespace) -> dict[str, Any]:
    """All layers and offsets in one pass."""
    return ours(cache, args, args.layers or list(cache.layers), args.offsets)


def ours(
    cache: ActivationCache, args: argparse.Namespace, layers: list[int], offsets: list[int]
) -> dict[str, Any]:
    meter = Meter()
    probe = VocabProbe(offsets, layers, epochs=args.epochs, lr=args.lr).fit(cache)
    found = meter.read()
    parameters = probe.map(args.layer, args.offset)
    ce = held_out(
        cache, args.layer, args.offset, lambda rows: apply_parametrization(parameters, rows)
    )
    row = next(r for r in probe.metrics() if (r["layer"], r["offset"]) == (args.layer, args.offset))
    return {**found, "ce": ce, "probes": len(probe.pairs()), "lr": row["lr"], "steps": row["steps"]}


def small(cache: ActivationCache, args: argparse.Namespace) -> tuple[Any, ...]:
    """Rows whose label is one of the most frequent tokens, as float32 arrays."""
    x, y = rows_of(cache, args.layer, args.offset, "train")
    test, truth = rows_of(cache, args.layer, args.offset, "test", HELD_OUT)
    often = torch.bincount(y, minlength=cache.vocab).argsort(descending=True)[: args.classes]
    keep, held = torch.isin(y, often), torch.isin(truth, often)
    return x[keep].numpy(), y[keep].numpy(), test[held].numpy(), truth[held].numpy()


def sgd_classifier(cache: ActivationCache, args: argparse.Namespace) -> dict[str, Any]:
    """scikit-learn's, on standardised rows."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, test, truth = small(cache, args)
    meter = Meter()
    model = make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss", random_state=0))
    model.fit(x, y)
    return {**meter.read(), "ce": log_loss(model, test, truth), "probes": 1}


def vocab_on_arrays(cache: ActivationCache, args: argparse.Namespace) -> dict[str, Any]:
    x, y, test, truth = small(cache, args)
    meter = Meter()
    model = VocabProbe(epochs=args.epochs).fit(x, y)
    return {**meter.read(), "ce": log_loss(model, test, truth), "probes": 1}


def log_loss(model: Any, rows: np.ndarray, truth: np.ndarray) -> float:
    proba = model.predict_proba(rows)
    own = proba[np.arange(len(truth)), np.searchsorted(model.classes_, truth)]
    return float(-np.log(np.maximum(own, 1e-30)).mean())


RUNS = {
    "plain": plain,
    "one": one,
    "all": every,
    "sgd": sgd_classifier,
    "arrays": vocab_on_arrays,
}


def measure(args: argparse.Namespace, cache: ActivationCache, run: str, *more: str) -> Any:
    """Run in a process of its own, `--rounds` times; the one with the least CPU time.

    `rounds` has the CPU seconds of a probe in every round.
    """
    # The last word counts, so that the cache made here goes before one that was given.
    here = ["--cache", str(cache.path), "--run", run, *more]
    command = [sys.executable, __file__, *sys.argv[1:], *here]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    rounds = [
        json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)
        for _ in range(args.rounds)
    ]
    best = min(rounds, key=lambda found: found["cpu"])
    return {**best, "rounds": [found["cpu"] / found["probes"] for found in rounds]}


def show(name: str, found: dict[str, float], base: dict[str, float]) -> None:
    wall, cpu = found["wall"] / found["probes"], found["cpu"] / found["probes"]
    print(
        f"{name:28s} CE {found['ce']:.4f}   {wall:7.2f} s wall {cpu:7.2f} s CPU a probe "
        f"{found['mib']:6.0f} MiB   ratio {wall / base['wall']:.2f} wall {cpu / base['cpu']:.2f} "
        f"CPU {found['mib'] / base['mib']:.2f} memory",
        flush=True,
    )


def compare(args: argparse.Namespace, cache: ActivationCache) -> None:
    print(f"{cache.positions} positions x {cache.d_model}, vocabulary {cache.vocab}")
    figures = []

    def add_figure(key: str, what: str, baseline: str, found: Any, base: Any) -> None:
        show(f"residua, {what}", found, base)
        note = f"held-out CE {found['ce']:.3f} for {base['ce']:.3f} nats"
        figures.append(Figure(key, what, baseline, found["rounds"], base["rounds"], note))

    size = f"{cache.positions:,} positions x {cache.d_model}, vocabulary {cache.vocab:,}"
    if "plain" in args.only:
        runs = [measure(args, cache, "plain", "--lr", str(lr)) for lr in args.rates]
        for lr, found in zip(args.rates, runs, strict=True):
            show(f"plain torch, lr {lr:g}", found, found)
        best = min(runs, key=lambda found: found["ce"])
        baseline = f"`nn.Linear`, AdamW, standardised rows in memory, {args.plain_epochs} epochs"
        if "one" in args.only:
            what = f"vocabulary probe, {args.epochs} epochs of {size}; labels, sweep, validation"
            add_figure("vocab_one", what, baseline, measure(args, cache, "one"), best)
        if "all" in args.only:
            found = measure(args, cache, "all")
            what = f"{found['probes']} vocabulary probes in one pass, each"
            add_figure("vocab_all", what, baseline, found, best)
    if "sklearn" in args.only:
        found = measure(args, cache, "sgd")
        show(f"SGDClassifier, {args.classes} classes", found, found)
        what = f"vocabulary probe on arrays, {args.classes} classes"
        baseline = "`StandardScaler`, `SGDClassifier`"
        add_figure("vocab_arrays", what, baseline, measure(args, cache, "arrays"), found)
    write_results(args.json, figures)


def main() -> None:
    args = arguments()
    if args.run:
        torch.set_num_threads(args.threads)
        # The first optimiser of a process loads torch's compiler, which is nobody's fit.
        torch.optim.AdamW([torch.zeros(2)], fused=True).step()
        print(json.dumps(RUNS[args.run](ActivationCache(args.cache), args)))
        return
    if args.threads == 1:
        use_one_core()  # the processes of the runs inherit it
    if args.cache:
        compare(args, ActivationCache(args.cache))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, sample_cache(Path(folder), args.positions))


if __name__ == "__main__":
    main()
