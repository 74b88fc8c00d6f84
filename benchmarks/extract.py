"""Extraction against a bare forward pass over the same batches, in one process, taking turns.

    python benchmarks/extract.py                # a random GPT-2 of 14 M parameters
    python benchmarks/extract.py --d-model 512 --layers 8 --tokens 65536

Prints the ratio of wall and CPU time (goal: 1.05), what the writer alone needs, and peak memory
for one and for ten times the tokens. The bare forward runs the whole model, its head included;
extraction stops after the last block.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from residua.cache.checks.model_checks import check_model
from residua.cache.format.layout import Layout
from residua.cache.format.manifest import CaptureIdentity, Manifest, ModelIdentity, TokenIdentity
from residua.cache.format.shard import ShardWriter
from residua.cache.forward.batches import plan_batches
from residua.cache.forward.write_parts import write_missing_parts
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.tokens.token_stream import TokenStream


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocab, n_embd=args.d_model, n_layer=args.layers,
        n_head=max(1, args.d_model // 64), n_positions=args.context,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    return model.eval().requires_grad_(False)


def prepare(args: argparse.Namespace, root: Path, model: torch.nn.Module, tokens: int) -> tuple:
    """An empty cache of random tokens, and the stack of the model."""
    ids = np.random.default_rng(0).integers(0, args.vocab, tokens, dtype=np.int32)
    count = tokens // args.context
    stream = TokenStream(ids, np.full(count, args.context), np.arange(count))
    canary = check_model(model, stream, "float32", "auto")
    digest, hashes = stream.digests()
    manifest = Manifest(
        ModelIdentity("0", "0", "GPT2"),
        TokenIdentity(digest, tokens, count, "0", args.context, True, time.monotonic_ns()),
        CaptureIdentity("float32", "auto", "default"), Layout.choose(args.d_model, 2),
        args.d_model, args.vocab, args.layers, 4096, "random", "random",
    )  # fmt: skip
    path = create_cache(root, manifest, stream, hashes, canary.dtypes, canary.head.save, {})
    return ActivationCache(path), canary.stack


def bare(cache: ActivationCache, model: Any) -> None:
    """The whole model over the batches of the extraction; nothing is kept."""
    starts, lengths = cache.sequence_start, cache.sequence_length
    for part in range(cache.n_parts):
        plan = plan_batches(
            starts, lengths, cache.manifest.layout, part, cache.manifest.batch_tokens
        )
        for batch in plan:
            rows = [
                cache.tokens[int(starts[n]) : int(starts[n] + lengths[n])] for n in batch.sequences
            ]
            with torch.inference_mode():
                model(input_ids=torch.from_numpy(np.stack(rows).astype(np.int64)), use_cache=False)


def timed(function: Any, *args: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def writer_ratio(folder: Path, cache: ActivationCache) -> float:
    """Speed of our shard writer as a share of a raw write and fsync of the same bytes."""
    layout = cache.array("residual/0").layout
    rows = (
        np.random.default_rng(0).integers(0, 255, (layout.chunk_rows, cache.d_model)).astype("<f2")
    )
    chunks = layout.shard_rows // layout.chunk_rows

    def raw() -> None:
        with open(folder / "raw", "wb") as file:
            for _ in range(chunks):
                file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())

    def ours() -> None:
        writer = ShardWriter(folder / "c" / "0" / "0", layout, layout.shard_rows)
        for chunk in range(chunks):
            writer.write(chunk * layout.chunk_rows, rows)
        writer.commit()

    times: dict[str, float] = {}
    for _ in range(7):
        for name, function in (("raw", raw), ("ours", ours)):
            times[name] = min(times.get(name, 9e9), timed(function)[0])
    return times["raw"] / times["ours"]


def peak(args: argparse.Namespace, tokens: int) -> float:
    """Peak memory in MiB of a process that extracts `tokens`.

    Freed blocks go back to the system at once: what glibc keeps of them varies by 100 MiB from run
    to run, for a bare forward pass as well, and the highest of many batches is taken here.
    """
    command = [sys.executable, __file__, "--only", str(tokens)]
    for name in ("d_model", "layers", "vocab", "context"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout)


def main() -> None:
    args = parse()
    model = build(args)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.only:
            write_missing_parts(*prepare(args, root, model, args.only))
            status = Path("/proc/self/status").read_text()
            print(int(status.split("VmHWM:")[1].split()[0]) / 1024)  # ru_maxrss is the parent's
            return
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{size:.1f} M parameters, {args.tokens:,} tokens, {torch.get_num_threads()} threads")
        best: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            cache, stack = prepare(args, root, model, args.tokens)
            for name, function, operands in (
                ("forward", bare, (cache, model)),
                ("extract", write_missing_parts, (cache, stack)),
            ):
                wall, cpu = timed(function, *operands)
                kept = best.setdefault(name, [wall, cpu])
                best[name] = [min(kept[0], wall), min(kept[1], cpu)]
        for name, (wall, cpu) in best.items():
            print(
                f"{name:8s} {wall:7.2f} s wall {cpu:7.2f} s CPU {args.tokens / wall:9,.0f} tokens/s"
            )
        ratios = [e / f for e, f in zip(best["extract"], best["forward"], strict=True)]
        print(f"extraction / bare forward: {ratios[0]:.3f} wall, {ratios[1]:.3f} CPU")
        (root / "c" / "0").mkdir(parents=True)
        print(f"shard writer: {writer_ratio(root, cache):.2f} of a raw write + fsync")
        if args.memory:
            small, large = peak(args, args.tokens), peak(args, 10 * args.tokens)
            growth = large / small - 1
            print(
                f"peak memory {small:.0f} MiB, at ten times the tokens {large:.0f} ({growth:+.1%})"
            )


if __name__ == "__main__":
    main()
