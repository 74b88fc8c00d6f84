"""Hours and bytes of every step for large models, from the figures of `wide.py`; writes a table.

    python benchmarks/wide.py --json benchmarks/wide.json
    python benchmarks/scale.py                # writes the tables of docs/scale.md

Hours are FLOPs over rate: the FLOPs of a row times the rows that a step reads by default, at the
measured share of the measured rate of products (CPU), or at half of the published rate (GPU, not
measured). Where reading the cache takes longer than the products, reading is what binds.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import replace_table

from residua.probes.vocabulary.parametrizations import default_rank

FIGURES = Path(__file__).parent / "wide.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
CORES_SHARE = 0.9
"""Rate of n cores, as a part of n times the rate of one: an assumption."""
GPU_SHARE = 0.5
"""Part of the published rate of a GPU at which fits are assumed to run."""
STEP_ROWS, STEPS, CURVATURE_ROWS = 1024, 400, 4
"""Lens: rows of a step, most steps, and rows per dimension that measure the curvature."""
EVALUATION_POSITIONS = 16_384
BASIS_ROWS, BASIS_EVALUATIONS = 16_384, 60
"""Causal basis: rows, and evaluations of a joint search."""
VOCABULARY_ROWS = 2_000_000
"""Rows of all passes of a vocabulary probe, which stops when its loss no longer falls."""
FOLDS, MEASURED_FOLDS = 5, 2
"""Folds of ridge by default, each with an eigendecomposition, and in the fit of `wide.py`."""


@dataclass(frozen=True)
class Model:
    """A model, and the tokens to cache of it."""

    name: str
    d_model: int
    vocab: int
    layers: int
    parameters: float
    tokens: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer, in half precision."""
        return 2 * self.d_model


@dataclass(frozen=True)
class Machine:
    """Rates of a machine in FLOP/s, and how fast it reads the cache in bytes per second."""

    name: str
    float64: float
    float32: float
    bfloat16: float
    read: float
    share: float | None = None
    """Part of the rate that every step gets; None: the part that `wide.py` measured."""


@dataclass(frozen=True)
class Step:
    """A step for one layer: what a row costs, and how many rows are read."""

    name: str
    flops: float
    """Of all rows together."""
    rows: int
    """Rows of a layer, and of the last one, that are read."""
    dtype: str
    share: float
    """Measured part of the rate."""


MODELS = (
    Model("8 B, 10 M tokens", 4096, 128_256, 32, 8e9, 10_000_000),
    Model("70 B, 100 M tokens", 8192, 128_256, 80, 70e9, 100_000_000),
)


def machines(figures: dict[str, Any]) -> tuple[Machine, ...]:
    """2 and 64 cores like the measured one, and a GPU with the published rates of an H100 SXM."""
    one = {name: 1e9 * figures[name]["gflops"] for name in ("float64", "float32")}
    one["bfloat16"] = 1e9 * figures.get("bfloat16", figures["float32"])["gflops"]

    def cores(n: int, read: float) -> Machine:
        rates = {name: n * CORES_SHARE * rate for name, rate in one.items()}
        return Machine(f"{n} cores", **rates, read=read)

    gpu = Machine("one H100", 67e12, 67e12, 989e12, read=5e9, share=GPU_SHARE)
    return cores(2, 1e9), cores(64, 3e9), gpu


def steps(model: Model, figures: dict[str, Any], rows: int) -> Iterator[Step]:
    """The steps of one layer and offset, for a cache of `rows` rows."""
    d, vocab = model.d_model, model.vocab
    head = 2.0 * d * vocab

    def share(name: str) -> float:
        return figures[name]["share"]

    yield Step("ridge: moments", 4.0 * d * d * rows, rows, "float64", share("moments float64"))
    # The measured fit has few rows: nearly all of it is the solution, whose work grows as d^3.
    moments, one = figures["moments float64"], figures["float64"]["gflops"] * 1e9
    measured_d = math.sqrt(moments["gflop_per_row"] * 1e9 / 4)
    folds = FOLDS / MEASURED_FOLDS * (d / measured_d) ** 3
    solution = figures["ridge, whole fit"]["seconds"] * folds * one
    yield Step("ridge: solution", solution, 0, "float64", 1.0)
    lens_rows = STEP_ROWS * STEPS + CURVATURE_ROWS * d
    teacher = head / model.layers
    lens = "lens: one step"
    yield Step(
        "tuned lens, 400 steps", (2 * head + 12 * d * d + teacher) * lens_rows, lens_rows,
        figures[lens]["dtype"], share(lens),
    )  # fmt: skip
    vocabulary = figures["vocabulary: step"]
    rank = default_rank(vocab, d) or d
    vocabulary_rows = min(3 * rows, VOCABULARY_ROWS)
    yield Step(
        f"vocabulary probe, rank {rank}", 6.0 * rank * (vocab + d) * vocabulary_rows,
        vocabulary_rows, vocabulary["dtype"], share("vocabulary: step"),
    )  # fmt: skip
    evaluation = figures["evaluation: two probes"]
    yield Step(
        "evaluation, two probes", (2 * head + teacher) * EVALUATION_POSITIONS,
        EVALUATION_POSITIONS, evaluation["dtype"], evaluation["share"],
    )  # fmt: skip


def basis_hours(model: Model, figures: dict[str, Any], machine: Machine, one: Machine) -> float:
    """Hours of a causal basis of one layer; its evaluations are exponentials, not products."""
    token_ns = figures["basis: loss and gradient, one direction"]["ns_per_token"]
    evaluations = BASIS_ROWS * BASIS_EVALUATIONS * model.vocab * token_ns * 1e-9
    return evaluations * one.float32 / machine.float32 / 3600


def hours_of(step: Step, model: Model, machine: Machine) -> tuple[float, str]:
    """Hours of a step, and what binds: `products` or `reading`."""
    products = step.flops / (getattr(machine, step.dtype) * (machine.share or step.share))
    reading = 2 * step.rows * model.row_bytes / machine.read
    return max(products, reading) / 3600, "products" if products >= reading else "reading"


def format_hours(hours: float) -> str:
    """`3 days`, `2.1 h`, `14 min`, `5 s`."""
    for size, unit in ((24 * 365, "years"), (24, "days"), (1, "h"), (1 / 60, "min")):
        if hours >= 2 * size or (unit == "h" and hours >= 1):
            return (
                f"{hours / size:.2g} {unit}" if hours / size < 10 else f"{hours / size:.0f} {unit}"
            )
    seconds = hours * 3600
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def format_bytes(size: float) -> str:
    """`2.7 TB`."""
    power = min(5, int(math.log10(size)) // 3)
    return f"{size / 1000**power:.3g} {' KMGTP'[power]}B"


def table_rows(figures: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of docs/scale.md: what, and a cell for each machine."""
    all_machines = machines(figures)
    one = Machine("1 core", *(1e9 * figures[n]["gflops"] for n in ("float64", "float32")), 0, 1e9)
    for model in MODELS:
        whole = (model.layers + 1) * model.row_bytes * model.tokens
        yield [
            f"**{model.name}**: bytes of all {model.layers + 1} layers",
            *[format_bytes(whole)] * 3,
        ]
        forward = 2 * model.parameters * model.tokens
        cells = [
            format_hours(forward / (machine.bfloat16 * (machine.share or 0.8)) / 3600)
            for machine in all_machines
        ]
        yield ["extraction (forward passes)", *cells]
        for step in steps(model, figures, model.tokens):
            cells = []
            for machine in all_machines:
                hours, limit = hours_of(step, model, machine)
                cells.append(f"{format_hours(hours)} ({limit})")
            yield [f"{step.name}, one layer", *cells]
        cells = [
            f"{format_hours(basis_hours(model, figures, m, one))} (exponentials)"
            for m in all_machines[:2]
        ]
        yield ["causal basis, one layer", *cells, "not measured"]


def scale_table(figures: dict[str, Any]) -> str:
    """Hours and bytes in Markdown."""
    header = ["", *(machine.name for machine in machines(figures))]
    return _markdown([header, ["---"] * len(header), *table_rows(figures)])


def cost_table(figures: dict[str, Any]) -> str:
    """What was measured, per row, in Markdown."""
    header = ["", "ms per row", "GFLOP/s", "share of the rate of products", "peak"]
    lines = [header, ["---"] * len(header)]
    for name, row in figures.items():
        if "gflops" not in row:
            lines.append(
                [name, f"{row['seconds']:.0f} s in all", "", "", format_bytes(row["peak_bytes"])]
            )
        elif row["name"] == row["dtype"]:
            lines.append([f"products, {name}", "", f"{row['gflops']:.0f}", "", ""])
        else:
            work = [f"{row['ms_per_row']:.3g}", f"{row['gflops']:.1f}"]
            share = "" if "ns_per_token" in row else f"{row['share']:.2f} ({row['dtype']})"
            lines.append([name, *work, share, format_bytes(row["peak_bytes"])])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_tables(result: dict[str, Any]) -> str:
    """Both tables of docs/scale.md."""
    figures = {row["name"]: row for row in result["figures"]}
    machine = f"`{result['command']}` on {result['machine']['processor']}, one thread."
    return "\n\n".join([machine, cost_table(figures), scale_table(figures)])


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    replace_table(PAGE, page_tables(json.loads(FIGURES.read_text())))


if __name__ == "__main__":
    main()
