"""Extracts from a tiny model of every causal language model class and writes the table of the docs.

    python benchmarks/architectures.py              # all classes, rewrites docs/architectures.md
    python benchmarks/architectures.py llama gpt2   # some, to the terminal

Models are built from shrunk configurations with noise on every parameter and scalar constants off
their defaults (`tests/support/architectures.py`); how each is judged:
`tests/support/conformance.py`.
"""

import argparse
import collections
import importlib.metadata
import tempfile
import time
import warnings
from pathlib import Path

import torch

from residua.tests.support.architectures import KINDS
from residua.tests.support.conformance import TOLERANCE, Verdict, check_architecture

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEADER = """# Architectures

Written by `python benchmarks/architectures.py`; do not edit by hand. transformers {transformers},
torch {torch}, float32 on the CPU, {seconds:.0f} s on one thread.

Blocks and head are found by watching a model run; the product knows no model names. Of the {total}
types that transformers maps to a causal language model, {built} were built as tiny random models
(configurations shrunk by rule, noise on every parameter, scalar constants off their defaults):
**{extracted} extract, {refused} are refused with a reason before anything is written, {wrong} are
wrong.**

*Extracts* means: the head reproduces the model's logits from layer L to {tolerance:.0e} of the
largest logit, on other tokens, on another batch shape, for rows in any order and one alone, for
residuals a thousand times smaller (where the norm's eps matters), by numpy, by torch and from the
disk, after the model was filled with NaN; right padding does not change a row, or padding is off.

- **head**: `explicit` (norm, gain, unembedding, bias, scale, softcap as plain tensors) {explicit}
  times, `program` (a list of operations, run by numpy or torch) {program} times.
- **layout**: how the stream of 2 sequences of 29 tokens lies in the model where that is not
  `(batch, length, d_model)`; the cache flattens it to that. `x 2`: two tensors side by side.
- **layer 0**: `mixed` if something mixes positions before the blocks found (an encoder, other
  blocks, a convolution), so that layer 0 is not the embedding of its token.
- **causal**: `no` means that later tokens change earlier residuals as the configuration stands
  (encoders without `is_decoder`, prefix models); the cache is marked with it.
- **padding**: `off` means that a padded row differs, so only equal lengths share a batch.
- **states**: `same` if layers 0 to L-1 equal the `hidden_states` that transformers reports;
  `other` if they are reported differently (off by one, reshaped, other stacks mixed in).

| type | class | blocks | d_model | layout | head | layer 0 | causal | padding | states | error |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def row(verdict: Verdict) -> str:
    """One line of the table."""
    if verdict.status != "extracted":
        reason = verdict.reason.replace("|", "/")
        return f"| {verdict.kind} | {verdict.model} | **{verdict.status}**: {reason} ||||||||| "
    cells = (
        verdict.kind, verdict.model, f"{verdict.blocks} ({verdict.depth})", verdict.d_model,
        verdict.layout, verdict.head, "" if verdict.embedding else "mixed",
        "" if verdict.causal else "no", "" if verdict.pad else "off", verdict.states,
        f"{verdict.error:.0e}",
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def page(verdicts: list[Verdict], seconds: float) -> str:
    """The whole page."""
    count = collections.Counter(verdict.status for verdict in verdicts)
    heads = collections.Counter(verdict.head for verdict in verdicts)
    head = HEADER.format(
        transformers=importlib.metadata.version("transformers"),
        torch=torch.__version__,
        seconds=seconds,
        total=len(verdicts),
        built=len(verdicts) - count["not built"],
        extracted=count["extracted"],
        refused=count["refused"],
        wrong=count["wrong"],
        tolerance=TOLERANCE,
        explicit=heads["explicit"],
        program=heads["program"],
    )
    return head + "\n".join(row(verdict).rstrip() for verdict in verdicts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; all if none is given")
    kinds = parser.parse_args().kinds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds or KINDS:
            verdicts.append(check_architecture(kind, Path(folder) / kind))
            print(row(verdicts[-1]), flush=True)
    text = page(verdicts, time.perf_counter() - began)
    if not kinds:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    print(text.split("\n| type")[0].splitlines()[7:9])


if __name__ == "__main__":
    main()
