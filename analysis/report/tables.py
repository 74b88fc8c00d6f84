"""Tables of an evaluation by offset, and headline sentences about them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.metrics import KS, EvaluationRow, ascending_kl, precision, shown
from ..evaluation.result import Evaluation
from .probe_style import ahead, label

if TYPE_CHECKING:
    pass


PRECISIONS = tuple(f"precision_at_{k}" for k in KS)


@dataclass(frozen=True)
class OffsetTable:
    """KL and precision@1 of all probes at one offset, side by side for a terminal."""

    offset: int
    columns: tuple[str, ...]
    """`layer`, then `<probe> KL` and `<probe> p@1` for each probe that reads layers."""
    rows: list[tuple[float | None, ...]]
    """One per layer, from the lowest; None where a probe does not read it."""
    caption: str
    """N, n, and the baselines that read no layer."""


def offset_tables(evaluation: Evaluation) -> list[OffsetTable]:
    """KL and precision@1 by layer, one table per offset."""
    return [offset_table(evaluation, offset) for offset in evaluation.offsets]


def offset_table(evaluation: Evaluation, offset: int) -> OffsetTable:
    """The rows of one offset side by side, layers down."""
    rows = [row for row in evaluation.rows if row.offset == offset]
    probes = [name for name in evaluation.probes if any(_reads(row, name) for row in rows)]
    cells = {(row.layer, row.probe): (row.kl, row.precision_at_1) for row in rows}
    lines: list[tuple[float | None, ...]] = []
    for layer in sorted({row.layer for row in rows if row.layer is not None}):
        pairs = [cells.get((layer, name), (None, None)) for name in probes]
        lines.append((layer, *(value for pair in pairs for value in pair)))
    baselines = [
        f"{row.probe}: KL {shown(row.kl, 3)}, p@1 {shown(row.precision_at_1, 3)}"
        for row in rows
        if row.layer is None
    ]
    n = max((row.n for row in rows), default=0)
    caption = "; ".join([f"N = {offset} ({ahead(offset)}), n = {n:,}", *baselines])
    columns = ("layer", *(f"{name} {what}" for name in probes for what in ("KL", "p@1")))
    return OffsetTable(offset, columns, lines, caption)


def _reads(row: EvaluationRow, probe: str) -> bool:
    return row.probe == probe and row.layer is not None


def headlines(evaluation: Evaluation) -> list[str]:
    """Sentences that the numbers say, plain text; the first at the middle layer, N = 0."""
    return [s for offset in evaluation.offsets for s in _headline(evaluation, offset)]


def _headline(evaluation: Evaluation, offset: int) -> list[str]:
    rows = [row for row in evaluation.rows if row.offset == offset]
    lenses = [row for row in rows if row.layer is not None]
    if not lenses:
        return []
    if offset == 0:
        layers = sorted({row.layer for row in lenses if row.layer is not None})
        middle = layers[len(layers) // 2]
        first, *rest = sorted((r for r in lenses if r.layer == middle), key=ascending_kl)
        says = f"At layer {middle} the {label(first.probe)} is {_kl(first)} nats from the model"
        return [", ".join([says, *(f"the {label(r.probe)} {_kl(r)}" for r in rest)]) + " (N = 0)."]
    best = {p: [r for r in lenses if r.probe == p] for p in evaluation.probes}
    tops = [max(found, key=precision) for found in best.values() if found]
    tops.sort(key=precision, reverse=True)
    parts = [f"{_share(row)} for the {label(row.probe)} (layer {row.layer})" for row in tops]
    parts += [
        f"{_share(row)} for the {label(row.probe)} (which reads {_tokens(row)})"
        for row in rows
        if row.layer is None
    ]
    says = f"At N = {offset} ({ahead(offset)}) the best precision@1 is "
    return [says + ", ".join(parts) + "; each layer was chosen on the same data."]


def _tokens(row: EvaluationRow) -> str:
    """What a baseline without a layer reads."""
    kind, offset = row.probe.partition(" ")[0], row.offset
    known = {
        "unigram": "nothing",
        "lagged": "token t",
        "chain": "token t",
        "trigram": f"tokens t+{offset - 1} and t+{offset}",
    }
    return known.get(kind, f"token t+{offset}")


def _kl(row: EvaluationRow) -> str:
    return shown(row.kl, 2) + _bounds(row.kl_low, row.kl_high, 2)


def _share(row: EvaluationRow) -> str:
    bounds = _bounds(row.precision_at_1_low, row.precision_at_1_high, 3)
    return f"{shown(row.precision_at_1, 3)}{bounds}"


def _bounds(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
