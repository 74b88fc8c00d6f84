"""Evaluation of a ridge lens and the logit lens against plain torch, and the limit of the products.

    python benchmarks/evaluate.py                                       # d 256, vocabulary 4,000
    python benchmarks/evaluate.py --d-model 2048 --vocab 50000 --positions 512 --offsets 1
    python benchmarks/evaluate.py --products bfloat16 --json evaluate.json

Random states and head; CPU seconds of one thread, sides in turns, medians of the rounds. Plain
torch is what a careful user writes for fewer measures: log_softmax, KL, top-10 tokens and
surprisal, the logit lens once for all offsets. The limit is the time of the head's and the maps'
products at the rate of a large product (2 d V and 2 d d operations a row). `--products bfloat16`
also prints how far it moves a KL, beside the KL's interval.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from results import Figure, write_results
from threadpoolctl import threadpool_limits

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.evaluation.result import Evaluation
from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.tests.support.synthetic import make_cache

LARGE = 2048
"""Rows, columns and depth of the product whose rate is the limit."""
SEQUENCE = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--offsets", type=int, default=4, help="offsets 0 to this, exclusive")
    parser.add_argument("--products", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args()


def synthetic_cache(root: Path, args: argparse.Namespace) -> ActivationCache:
    """Two layers that share most of their variance, and a head with logits of a few nats."""
    rng = np.random.default_rng(0)
    rows, width = max(1, args.positions // SEQUENCE) * SEQUENCE, args.d_model
    last = rng.normal(size=(rows, width)).astype(np.float32)
    first = 0.8 * last + 0.6 * rng.normal(size=last.shape).astype(np.float32)
    unembedding = rng.normal(0, 3 / width**0.5, (args.vocab, width)).astype(np.float32)
    bias = rng.normal(0, 2, args.vocab).astype(np.float32)
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    head = Head("layernorm", 1e-5, ones, zeros, unembedding, bias)
    lengths = [SEQUENCE] * (rows // SEQUENCE)
    return make_cache(root, [first, last], lengths, head, dtype="float16")


def plain_torch(cache: ActivationCache, probe: RidgeProbe, offsets: int) -> dict[Any, float]:
    """KL, precision@10 and surprisal by (probe, offset) as sums; returns the KLs."""
    head, lengths = cache.head.torch(), cache.sequence_length
    maps = {
        n: (torch.tensor(a.weight, dtype=torch.float32), torch.tensor(a.bias, dtype=torch.float32))
        for (_, n, *_), a in probe.maps_.items()
    }
    kl: dict[Any, float] = {}
    count: dict[Any, int] = {}
    for start, length in zip(cache.sequence_start.tolist(), lengths.tolist(), strict=True):
        states, last = (
            torch.from_numpy(cache.residual_array(layer)[start : start + length])
            for layer in (0, cache.n_blocks)
        )
        log_p = head(last).log_softmax(-1)
        p, top = log_p.exp(), log_p.argmax(-1)
        logit_lens = head(states)
        for n in range(offsets):
            weight, bias = maps[n]
            mapped = head(torch.addmm(bias, states[: length - n], weight))
            for name, logits in (("ridge", mapped), ("logit", logit_lens[: length - n])):
                log_q = logits.log_softmax(-1)
                value = (p[n:] * (log_p[n:] - log_q)).sum(-1)
                best = logits.topk(10).indices
                (best == top[n:, None]).sum(-1)
                -log_p[n:].gather(1, best[:, :1])
                kl[name, n] = kl.get((name, n), 0.0) + float(value.double().sum())
                count[name, n] = count.get((name, n), 0) + length - n
    return {key: total / count[key] for key, total in kl.items()}


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def product_rate() -> float:
    """Floating-point operations a second of a large float32 product."""
    a, b = torch.randn(2, LARGE, LARGE)
    out = torch.empty(LARGE, LARGE)
    return 2 * LARGE**3 / min(cpu_seconds(lambda: torch.mm(a, b, out=out))[1] for _ in range(3))


def kl_by_key(evaluation: Evaluation) -> dict[Any, float]:
    """KL of ridge and logit lens by (probe, offset)."""
    return {
        (row.probe, row.offset): row.kl
        for row in evaluation.rows
        if row.probe in ("ridge", "logit") and row.kl is not None
    }


def describe_rounding(exact: Evaluation, rounded: Evaluation) -> dict[str, float]:
    """Largest change of a KL by the products, relative to the KL and to its interval."""
    changes, of_interval = [], []
    for left, right in zip(exact.rows, rounded.rows, strict=True):
        if left.kl and left.kl_low is not None and left.kl_high is not None and right.kl:
            changes.append(abs(right.kl - left.kl) / left.kl)
            of_interval.append(abs(right.kl - left.kl) / (left.kl_high - left.kl_low))
    return {"relative": max(changes), "of_interval": max(of_interval)}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1), torch.no_grad():
        cache = synthetic_cache(Path(folder), args)
        offsets = list(range(args.offsets))
        probe = RidgeProbe(offsets, [0], alpha=1.0, folds=1, products="float32")
        probe.fit(cache, keep=False)

        def ours(products: str = args.products) -> Evaluation:
            return evaluate(
                cache, probe, split="all", max_positions=cache.positions, layers=[0],
                offsets=offsets, products=products, device="cpu",
            )  # fmt: skip

        # The first round reads files and imports; it is not counted.
        evaluation, plain = ours(), plain_torch(cache, probe, args.offsets)
        seconds: dict[str, list[float]] = {"residua": [], "plain torch": []}
        rates = []
        for _ in range(args.rounds):
            seconds["residua"].append(cpu_seconds(ours)[1])
            seconds["plain torch"].append(
                cpu_seconds(lambda: plain_torch(cache, probe, args.offsets))[1]
            )
            rates.append(product_rate())
        rounding = describe_rounding(ours("float32"), ours("bfloat16"))

    found = kl_by_key(evaluation)
    difference = max(abs(found[key] - plain[key]) for key in plain)
    readings = sum(row.n for row in evaluation.rows if (row.probe, row.offset) in plain)
    # The reference and the logit lens once a row, the ridge lens and its map once an offset.
    heads = 2 + args.offsets
    width, vocab = cache.d_model, cache.vocab
    flops = cache.positions * (heads * 2 * width * vocab + args.offsets * 2 * width**2)
    limit = flops / median(rates)
    share = limit / median(seconds["residua"])
    for name, values in seconds.items():
        per_reading = 1e6 * median(values) / readings
        print(f"{name:12s} {per_reading:8.1f} us of CPU per row, offset and probe")
    print(
        f"{100 * share:.0f} % of the float32 products at {median(rates) / 1e9:.0f} GFLOP/s; KLs "
        f"equal to {difference:.1e}"
    )
    print(
        f"bfloat16 products move a KL by at most {100 * rounding['relative']:.3f} % of itself, "
        f"{100 * rounding['of_interval']:.2f} % of its interval"
    )
    figure = Figure(
        f"evaluate_{args.products}",
        f"evaluation of a ridge and the logit lens, {cache.positions:,} positions, {args.offsets} "
        f"offsets, d_model {width:,}, vocabulary {vocab:,}, {args.products} products",
        "plain torch, fewer measures: `log_softmax`, KL, top-10 tokens, surprisal",
        seconds["residua"],
        seconds["plain torch"],
        f"{100 * share:.0f} % of the float32 products' rate; KLs differ by {difference:.0e}",
    )
    write_results(args.json, [figure])


if __name__ == "__main__":
    main()
