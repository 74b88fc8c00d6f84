"""Extraction by two processes of one thread each against one process of two threads, interleaved.

    python benchmarks/workers.py
    python benchmarks/workers.py --rounds 5 --positions 65536 --layers 12 --d-model 512

The model is a random GPT-2 (about 10 million parameters); its forward passes and the writes are
timed, from when every process has all imported to when the last one is done. The ratio is the
best throughput of two processes over the best of one process: the target is at least 0.90.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

TARGET = 0.90


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--positions", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to put the files; default: the temporary folder")
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """A random model with a tokenizer, and enough text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

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


def work(folder: Path, root: Path, args: argparse.Namespace, threads: int, ready: Barrier) -> None:
    """Extract with `threads` threads, as soon as all processes are ready."""
    import torch

    from residua.cache.extraction.answer import answer_request
    from residua.cache.extraction.prepare import load_requested_model
    from residua.cache.extraction.request import ExtractionRequest
    from residua.cache.model.source import ModelSource

    torch.set_num_threads(threads)
    request = ExtractionRequest(
        str(folder / "model"), str(folder / "texts.txt"), root, context=args.context,
        max_tokens=args.positions, part_positions=args.positions // args.parts,
    )  # fmt: skip
    load_requested_model(
        request, ModelSource.locate(request.model)
    )  # transformers imports the model's code
    ready.wait()
    answer_request(request)
    ready.wait()


def seconds(folder: Path, args: argparse.Namespace, processes: int, threads: int) -> float:
    """Wall time of one extraction by `processes` processes of `threads` threads each."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
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
    ways = {"1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
    best = dict.fromkeys(ways, float("inf"))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        prepare(folder, args)
        for number in range(args.rounds):
            for way, (processes, threads) in ways.items():
                took = seconds(folder, args, processes, threads)
                best[way] = min(best[way], took)
                print(f"round {number + 1}  {way:<24}{args.positions / took:>9,.0f} positions/s")
    one, two = best.values()
    print(f"ratio {one / two:.2f} of the best rounds (target: at least {TARGET:.2f})")


if __name__ == "__main__":
    main()
