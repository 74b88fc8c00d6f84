"""Extraction against bare forward passes over the same batches, in one process, taking turns.

    python benchmarks/extract.py                # a random GPT-2 of 14 M parameters
    python benchmarks/extract.py --d-model 512 --layers 8 --tokens 65536

CPU seconds of one thread. The forward passes and the writing of an extraction are compared with the
blocks alone (what must be computed: no final norm, no head) and with the whole model; the call of
`residua.extract` as a whole, on the sample model, with a script that does the same: tokenizer,
batches, `output_hidden_states`, half precision, one .npy file per layer, fsync. With `--memory`
also peak memory at one and at ten times the tokens; with `--writer` the shard writer against a raw
write.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, use_one_core, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import residua
from residua.cache.checks.model_checks import check_model
from residua.cache.format.layout import Layout
from residua.cache.format.manifest import CaptureIdentity, Manifest, ModelIdentity, TokenIdentity
from residua.cache.format.shard import ShardWriter
from residua.cache.forward.batches import plan_batches
from residua.cache.forward.write_parts import write_missing_parts
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.tokens.token_stream import TokenStream
from residua.sample import MODEL_DIR, TEXT_PATH


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
    parser.add_argument("--call-tokens", type=int, default=16384, help="of the whole call")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--writer", action="store_true", help="also measure the shard writer")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
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


class LastBlockDone(Exception):
    """Ends a forward pass after the blocks."""


def blocks_alone(cache: ActivationCache, model: Any) -> None:
    """Embeddings and blocks over the batches of the extraction; no norm, no head."""

    def stop(*_: Any) -> None:
        raise LastBlockDone

    handle = model.transformer.h[-1].register_forward_hook(stop)
    try:
        whole_model(cache, lambda **batch: _run_blocks(model, batch))
    finally:
        handle.remove()


def _run_blocks(model: Any, batch: dict[str, Any]) -> None:
    with suppress(LastBlockDone):
        model(**batch)


def whole_model(cache: ActivationCache, model: Any) -> None:
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


def fill_figures(args: argparse.Namespace, root: Path, model: Any) -> list[Figure]:
    """Forward passes and writes of an extraction against forward passes alone."""
    seconds: dict[str, list[float]] = {"blocks": [], "model": [], "extract": []}
    for number in range(-1, args.rounds):  # the first round is not counted
        cache, stack = prepare(args, root, model, args.tokens)
        works = {
            "blocks": (blocks_alone, cache, model),
            "model": (whole_model, cache, model),
            "extract": (write_missing_parts, cache, stack),
        }
        for name, (function, *operands) in works.items():
            cpu = timed(function, *operands)[1]
            if number >= 0:
                seconds[name].append(cpu)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"forward passes and writes, GPT-2 of {size:.0f} M parameters, {args.tokens:,} tokens"
    return [
        Figure("extract_blocks", what, "the blocks alone", seconds["extract"], seconds["blocks"]),
        Figure("extract_model", what, "the whole model", seconds["extract"], seconds["model"]),
    ]


def extract_by_hand(folder: Path, args: argparse.Namespace) -> None:
    """A script's extraction: packed texts, all hidden states in half precision as .npy files."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
    ids: list[int] = []
    for line in Path(TEXT_PATH).read_text().splitlines():
        if len(ids) >= args.call_tokens:
            break
        ids += [tokenizer.eos_token_id or 0, *tokenizer(json.loads(line)["text"])["input_ids"]]
    count = min(len(ids), args.call_tokens) // args.context
    sequences = torch.tensor(ids[: count * args.context]).reshape(count, args.context)
    layers: list[list[np.ndarray]] = []
    with torch.inference_mode():
        for batch in sequences.split(4096 // args.context):
            hidden = model(
                input_ids=batch, output_hidden_states=True, use_cache=False
            ).hidden_states
            layers.append([rows.flatten(0, 1).half().numpy() for rows in hidden])
    for number, rows in enumerate(zip(*layers, strict=True)):
        with open(folder / f"{number}.npy", "wb") as file:
            np.save(file, np.concatenate(rows))
            file.flush()
            os.fsync(file.fileno())


def call_figure(args: argparse.Namespace, root: Path) -> Figure:
    """The whole call of `residua.extract` against `extract_by_hand`, on the sample model."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    tokens = 0
    for number in range(-1, args.rounds):
        with tempfile.TemporaryDirectory(dir=root) as folder:
            start = time.process_time()
            cache = residua.extract(
                MODEL_DIR, TEXT_PATH, root=folder, context=args.context, max_tokens=args.call_tokens
            )
            ours, tokens = time.process_time() - start, cache.positions
            theirs = timed(extract_by_hand, Path(folder), args)[1]
        if number >= 0:
            seconds["ours"].append(ours)
            seconds["theirs"].append(theirs)
    what = f"`residua.extract`, the whole call, sample model, {tokens:,} tokens"
    baseline = "script: `output_hidden_states`, half, .npy, fsync"
    return Figure("extract_call", what, baseline, seconds["ours"], seconds["theirs"])


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
        use_one_core()
        figures = [*fill_figures(args, root, model), call_figure(args, root)]
        write_results(args.json, figures)
        if args.writer:
            cache, _ = prepare(args, root, model, args.tokens)
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
