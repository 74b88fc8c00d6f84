"""Extraction by two processes of one thread each against one process of two threads, taking turns.

    python benchmarks/workers.py
    python benchmarks/workers.py --rounds 5 --positions 65536 --layers 12 --d-model 512

The model is a random GPT-2 (about 10 million parameters), the root is shared. *Forward passes and
writes* begin when every process has loaded the model and looked at the empty cache, and end when
the last process is done; *the whole call* begins before the texts are tokenised and the model is
loaded and checked, which every process does by itself. Wall seconds, since the processes wait for
each other: run it on two idle cores. The target is a ratio of at most 1.05.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from results import Figure, write_results

WAYS = {"ours": (2, 1), "theirs": (1, 2)}
"""Processes, and threads of each."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--folder", help="where to put the files; default: the temporary folder")
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """A random model with a tokenizer, enough text, and an empty cache of it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from residua.cache.extraction.answer import answer_request
    from residua.cache.model.transformers_guard import guard_transformers
    from residua.tests.support.models import VOCAB, build_tokenizer, texts

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=args.d_model, n_layer=args.layers, n_head=args.d_model // 64,
        n_positions=args.context, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with guard_transformers():
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("<|endoftext|>".join(texts(args.positions // 20)))
    # The share of a process that gets no part.
    share = f"{args.parts + 1}/{args.parts + 1}"
    answer_request(request_of(folder, folder / "empty", args, share))


def request_of(folder: Path, root: Path, args: argparse.Namespace, part: str | None = None) -> Any:
    from residua.cache.extraction.request import ExtractionRequest

    return ExtractionRequest(
        str(folder / "model"), str(folder / "texts.txt"), root, context=args.context,
        max_tokens=args.positions, part_positions=args.positions // args.parts, part=part,
    )  # fmt: skip


def write_rows(
    folder: Path, root: Path, args: argparse.Namespace, threads: int, ready: Barrier
) -> None:
    """Forward passes and writes with `threads` threads, as soon as all processes are ready."""
    import torch

    from residua.cache.checks.model_checks import recheck_model
    from residua.cache.extraction.prepare import load_requested_model
    from residua.cache.forward.write_parts import write_missing_parts
    from residua.cache.model.source import ModelSource
    from residua.cache.store.activation_cache import ActivationCache

    torch.set_num_threads(threads)
    request = request_of(folder, root, args)
    model = load_requested_model(request, ModelSource.locate(request.model))
    cache = ActivationCache(next(path.parent for path in root.glob("*/manifest.json")))
    stack = recheck_model(model, cache)
    ready.wait()
    write_missing_parts(cache, stack)
    ready.wait()


def answer(
    folder: Path, root: Path, args: argparse.Namespace, threads: int, ready: Barrier
) -> None:
    """The whole call with `threads` threads, as soon as all processes have imported all."""
    import torch

    from residua.cache.extraction.answer import answer_request
    from residua.cache.extraction.prepare import load_requested_model
    from residua.cache.model.source import ModelSource

    torch.set_num_threads(threads)
    request = request_of(folder, root, args)
    # transformers imports the model's code
    load_requested_model(request, ModelSource.locate(request.model))
    ready.wait()
    answer_request(request)
    ready.wait()


def seconds(
    folder: Path, args: argparse.Namespace, work: Any, processes: int, threads: int
) -> float:
    """Wall time of `work` by `processes` processes of `threads` threads each."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    if work is write_rows:
        shutil.copytree(folder / "empty", root)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    values: tuple[Any, ...] = (folder, root, args, threads, ready)
    workers = [context.Process(target=work, args=values) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    ready.wait()
    passed = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return passed


def main() -> None:
    args = arguments()
    works = {"rows": (write_rows, "forward passes and writes"), "call": (answer, "the whole call")}
    found: dict[str, dict[str, list[float]]] = {key: {side: [] for side in WAYS} for key in works}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        prepare(folder, args)
        for number in range(args.rounds):
            for key, (work, _) in works.items():
                for side, way in WAYS.items():
                    took = seconds(folder, args, work, *way)
                    found[key][side].append(took)
                    load = os.getloadavg()[0]
                    print(
                        f"round {number + 1}  {key:<5} {way[0]} x {way[1]} threads"
                        f"{args.positions / took:>9,.0f} positions/s   load {load:.1f}",
                        flush=True,
                    )
    size = f"{args.positions:,} tokens, {args.layers} blocks x {args.d_model}"
    figures = [
        Figure(
            f"workers_{key}",
            f"two processes of one thread on one root: {words}, {size}",
            "one process of two threads",
            found[key]["ours"],
            found[key]["theirs"],
            clock="wall",
        )
        for key, (_, words) in works.items()
    ]
    write_results(args.json, figures)


if __name__ == "__main__":
    main()
