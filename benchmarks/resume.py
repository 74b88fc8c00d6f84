"""Time of a model resumed from each layer, over that of a whole run, on one core.

    python benchmarks/resume.py
    python benchmarks/resume.py --model DIR --batch 8 --length 256

Takes turns: a whole run, the head alone on layer L, and the model resumed from every layer. The
time from layer l of L should be no more than 1 - l/L of a whole run, the head's share, and 5 % of
a whole run; the largest excess over the first two is printed last. CPU seconds of one thread.
"""

import argparse
import statistics
from functools import partial

from results import take_turns, use_one_core

import residua
from residua.cache.resuming.resumable_model import random_ids
from residua.sample import MODEL_DIR


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    import torch

    args = arguments()
    use_one_core()
    model = residua.load_model(args.model)
    depth = model.depth
    with torch.inference_mode():
        ids = random_ids(model.blocks.model, (args.batch, args.length), seed=0)
        layers = [model.run_residual(layer, ids) for layer in range(depth + 1)]
        for layer in range(depth + 1):
            model.check(layer)
        times = take_turns(
            {
                "whole run": partial(model.run, ids),
                **{
                    str(layer): partial(model.resume, layer, layers[layer], ids)
                    for layer in range(depth + 1)
                },
            },
            args.rounds,
        )
    ratios = {
        layer: statistics.median(
            resumed / whole
            for resumed, whole in zip(times[str(layer)], times["whole run"], strict=True)
        )
        for layer in range(depth + 1)
    }
    head = ratios[depth]
    print(
        f"{type(model.blocks.model).__name__}, {args.batch} x {args.length} tokens, {depth} blocks"
    )
    for layer, ratio in ratios.items():
        bound = 1 - layer / depth + head
        print(f"from layer {layer}: {ratio:.2f} of a whole run; 1 - l/L + head's share {bound:.2f}")
    excess = max(ratio - (1 - layer / depth + head) for layer, ratio in ratios.items())
    print(f"largest excess: {excess:+.3f} of a whole run, allowed +0.050")


if __name__ == "__main__":
    main()
