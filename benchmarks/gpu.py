"""Extraction, ridge moments, a lens step and evaluation on a GPU, against plain torch on it.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --part moments lens --device cuda:1 --d-model 4096 --vocab 128256

Random model, states and head. Seconds until the device has done all work, sides in turns, medians
of the rounds. Plain torch is what a careful user writes: blocks of rows from memory, copied to the
device; products in the dtype that residua takes; autograd for the lens; `log_softmax`, KL, top-10
tokens and surprisal for the evaluation. On a machine without a GPU nothing is measured.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, write_results

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.devices import choose_device
from residua.cache.head.head import Head
from residua.cache.head.row_buffers import reused_rows
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.natural_gradient import InputWhitening, NaturalGradientMap
from residua.probes.moments.moment_collection import collect_moments
from residua.probes.training.softmax_loss import (
    Gradients,
    ModelDistribution,
    add_head_gradients,
    fast_products,
    row_tiles,
)
from residua.tests.support.synthetic import make_cache

PARTS = ("extraction", "moments", "lens", "evaluation")
SEQUENCE = 256
BLOCK = 4096
"""Rows of a block of plain torch."""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--layers", type=int, default=16, help="blocks of the random GPT-2")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the extraction")
    parser.add_argument("--rows", type=int, default=65_536, help="positions of the other parts")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a lens step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args(words)
    args.context = SEQUENCE
    return args


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "synchronize"):
        module.synchronize()


def take_turns(
    device: torch.device, rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> tuple[list[float], list[float]]:
    """Seconds of both in each round; the round before them is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, rounds):
        for work, found in zip((ours, theirs), seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if number >= 0:
                found.append(time.perf_counter() - start)
    return seconds


class SyntheticStates:
    """A cache of two layers of bfloat16 rows, as arrays in memory and on disk, and its head."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        rng, d = np.random.default_rng(0), args.d_model
        shape = (max(1, args.rows // SEQUENCE) * SEQUENCE, d)
        last = rng.standard_normal(shape, np.float32)
        first = np.float32(0.8) * last + np.float32(0.6) * rng.standard_normal(shape, np.float32)
        unembedding = rng.standard_normal((args.vocab, d), np.float32) * np.float32(3 / d**0.5)
        ones, zeros = np.ones(d, np.float32), np.zeros(d, np.float32)
        bias = np.zeros(args.vocab, np.float32)
        head = Head("rmsnorm", 1e-5, ones, zeros, unembedding, bias)
        lengths = [SEQUENCE] * (shape[0] // SEQUENCE)
        layers = [first, last]
        self.cache: ActivationCache = make_cache(root, layers, lengths, head, dtype="bfloat16")
        self.stored = [torch.from_numpy(rows).bfloat16() for rows in layers]
        """Rows of both layers in the dtype of the cache, in memory."""

    def blocks(self, device: torch.device, rows: int = BLOCK) -> Any:
        """Blocks of both layers as float32 rows on `device`."""
        for pair in zip(*(layer.split(rows) for layer in self.stored), strict=True):
            yield [block.to(device).float() for block in pair]


def measure_moments(args: argparse.Namespace, device: torch.device, root: Path) -> Figure:
    """The second moments of ridge at one layer and offset, products in float32."""
    states = SyntheticStates(root, args)

    def ours() -> Any:
        return collect_moments(
            states.cache, [0], [0], folds=2, split="all", products="float32", device=device
        )

    def plain() -> list[torch.Tensor]:
        d = args.d_model
        xx, xy, yy = (torch.zeros(d, d, device=device) for _ in range(3))
        for x, y in states.blocks(device):
            xx.addmm_(x.T, x)
            xy.addmm_(x.T, y)
            yy.addmm_(y.T, y)
        return [total.cpu().double() for total in (xx, xy, yy)]

    what = f"second moments of {args.rows:,} rows, d_model {args.d_model:,}, float32 products"
    baseline = "plain torch: three products of blocks from memory"
    return Figure(
        "gpu_moments", what, baseline, *take_turns(device, args.rounds, ours, plain), clock="wall"
    )


def measure_lens(args: argparse.Namespace, device: torch.device, root: Path) -> Figure:
    """One step of a translator, the model's distribution included."""
    states, products = SyntheticStates(root, args), fast_products(device)
    d, n, vocab = args.d_model, min(args.batch, len(states.stored[0])), args.vocab
    head = states.cache.head.torch(device)
    x, last = (layer[:n].to(device).float() for layer in states.stored)
    identity, zeros = torch.eye(d), torch.zeros(d)
    whitening = InputWhitening(zeros, identity, identity.clone())
    fit = NaturalGradientMap(whitening, 0.1, lambda tensor: tensor.to(device, copy=True))
    fit.weight.copy_(fit.outputs)
    fit.curvature.fill_(1.0)

    def ours() -> torch.Tensor:
        z, gradient = fit.inputs(x), torch.zeros_like(x)
        for tile in row_tiles(n, vocab):
            memory = reused_rows("model", tile.stop - tile.start, vocab, x)
            model = ModelDistribution(head, tile.stop - tile.start)
            target = model.distribution(last[tile], memory, products=products, negentropy=False)
            options = Gradients(x=gradient[tile], scale=1 / n, products=products)
            add_head_gradients(fit.translate(z[tile]), head, target, options)
        fit.apply_gradient(z, gradient, rate=1e-3)
        return fit.bias

    weight = torch.eye(d).to(device).requires_grad_()
    bias = torch.zeros(d).to(device).requires_grad_()
    dtype = torch.bfloat16 if products == "bfloat16" else torch.float32
    unembedding = head.unembedding.to(dtype)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return (head.normalize(rows).to(dtype) @ unembedding.T).float()

    def plain() -> torch.Tensor:
        for tile in row_tiles(n, vocab):
            with torch.no_grad():
                log_p = logits(last[tile]).log_softmax(-1)
            log_q = logits(x[tile] @ weight + bias).log_softmax(-1)
            ((log_p.exp() * (log_p - log_q)).sum() / n).backward()
        with torch.no_grad():
            for parameter in (weight, bias):
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None
        return bias

    what = f"lens step of {n:,} rows, d_model {d:,}, vocabulary {vocab:,}, {products} products"
    baseline = "plain torch: KL by autograd in the same tiles, a step of SGD"
    return Figure(
        "gpu_lens", what, baseline, *take_turns(device, args.rounds, ours, plain), clock="wall"
    )


class FixedMap:
    """A readout by one matrix in front of the head."""

    kind = "map"

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(0, 0)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        assert batch.hidden is not None
        return batch.head(batch.hidden @ self.weight)


def measure_evaluation(args: argparse.Namespace, device: torch.device, root: Path) -> Figure:
    """All measures of a map and of the logit lens at one layer and offset."""
    states = SyntheticStates(root, args)
    head = states.cache.head.torch(device)
    weight = torch.randn(args.d_model, args.d_model) / args.d_model**0.5
    probe = FixedMap(weight.to(device))

    def ours() -> Any:
        return evaluate(
            states.cache, [probe], split="all", offsets=0, layers=0, device=device,
            max_positions=states.cache.positions, products="float32", progress=None,
        )  # fmt: skip

    def plain() -> list[float]:
        rows = min(BLOCK, max(256, (256 << 20) // (4 * args.vocab)))
        sums = [0.0, 0.0]
        with torch.no_grad():
            for x, last in states.blocks(device, rows):
                log_p = head(last).log_softmax(-1)
                p, top = log_p.exp(), log_p.argmax(-1)
                for number, hidden in enumerate((x @ probe.weight, x)):
                    log_q = head(hidden).log_softmax(-1)
                    best = log_q.topk(min(10, args.vocab)).indices
                    (best == top[:, None]).sum(-1)
                    log_p.gather(1, best[:, :1])
                    sums[number] += float((p * (log_p - log_q)).sum())
        return sums

    what = (
        f"evaluation of a map and the logit lens, {states.cache.positions:,} positions, d_model "
        f"{args.d_model:,}, vocabulary {args.vocab:,}, float32 products"
    )
    baseline = "plain torch, fewer measures: `log_softmax`, KL, top-10 tokens, surprisal"
    return Figure(
        "gpu_evaluation", what, baseline, *take_turns(device, args.rounds, ours, plain),
        clock="wall",
    )  # fmt: skip


def measure_extraction(args: argparse.Namespace, device: torch.device, root: Path) -> Figure:
    """Forward passes, copies and writes of a random GPT-2 against its blocks alone."""
    # The benchmark of extraction on the CPU; it needs transformers, the other parts do not.
    from extract import build, prepare

    from residua.cache.forward.batches import plan_batches
    from residua.cache.forward.write_parts import write_missing_parts

    model: Any = build(args).to(device)
    # Each round fills a cache of its own.
    caches = [prepare(args, root, model, args.tokens) for _ in range(args.rounds + 1)]
    waiting, cache = iter(caches), caches[0][0]

    def plain() -> None:
        starts, lengths = cache.sequence_start, cache.sequence_length
        for part in range(cache.n_parts):
            layout, tokens = cache.manifest.layout, cache.manifest.batch_tokens
            for batch in plan_batches(starts, lengths, layout, part, tokens):
                ids = [
                    cache.tokens[int(starts[n]) : int(starts[n] + lengths[n])]
                    for n in batch.sequences
                ]
                rows = torch.from_numpy(np.stack(ids).astype(np.int64)).to(device)
                with torch.inference_mode():
                    model.transformer(input_ids=rows, use_cache=False)

    seconds = take_turns(device, args.rounds, lambda: write_missing_parts(*next(waiting)), plain)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    what = (
        f"forward passes and writes, GPT-2 of {size:,.0f} M parameters, {args.tokens:,} tokens, "
        "float32"
    )
    baseline = "the blocks and the final norm alone"
    return Figure("gpu_extraction", what, baseline, *seconds, clock="wall")


PART_FUNCTIONS = {
    "extraction": measure_extraction,
    "moments": measure_moments,
    "lens": measure_lens,
    "evaluation": measure_evaluation,
}


def measure(args: argparse.Namespace, device: torch.device) -> list[Figure]:
    """The figures of all parts that `args` name."""
    figures = []
    for part in args.part:
        with tempfile.TemporaryDirectory() as folder:
            figures.append(PART_FUNCTIONS[part](args, device, Path(folder)))
    return figures


def main() -> None:
    args = arguments()
    device = choose_device(args.device)
    if device.type == "cpu":
        raise SystemExit(
            "this machine has no GPU that torch finds: nothing was measured; for the CPU there are "
            "the other benchmarks"
        )
    write_results(args.json, measure(args, device))


if __name__ == "__main__":
    main()
