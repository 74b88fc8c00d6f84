"""Tables of an evaluation by offset, and headline sentences about them.

The command line prints `offset_tables` (console/terminal.py); the HTML report quotes `headlines`
(html_report.py).
"""

from dataclasses import dataclass

from ..evaluation.metrics import KS, EvaluationRow, format_measure, kl_sort_key, precision_sort_key
from ..evaluation.result import Evaluation
from .probe_style import base_kind, format_offset, label

PRECISIONS = tuple(f"precision_at_{k}" for k in KS)
"""Names of the precision measures."""


@dataclass(frozen=True)
class OffsetTable:
    """KL and precision@1 of all probes at one offset, side by side for a terminal."""

    offset: int
    columns: tuple[str, ...]
    """`layer`, then `<probe> KL` and `<probe> p@1` for each probe that reads layers."""
    rows: list[tuple[float | None, ...]]
    """One row per layer, lowest first; None where a probe does not read the layer."""
    caption: str
    """Title: N, n, and the measures of baselines that read no layer."""


def offset_tables(evaluation: Evaluation) -> list[OffsetTable]:
    """KL and precision@1 by layer, one table per offset."""
    return [offset_table(evaluation, offset) for offset in evaluation.offsets]


def offset_table(evaluation: Evaluation, offset: int) -> OffsetTable:
    """The rows of one offset: a line per layer, two columns per probe that reads layers."""
    rows = [row for row in evaluation.rows if row.offset == offset]
    layer_rows = [row for row in rows if row.layer is not None]
    probes = [name for name in evaluation.probes if any(row.probe == name for row in layer_rows)]
    cells = {(row.layer, row.probe): (row.kl, row.precision_at_1) for row in layer_rows}
    lines: list[tuple[float | None, ...]] = []
    for layer in sorted({row.layer for row in layer_rows if row.layer is not None}):
        pairs = [cells.get((layer, name), (None, None)) for name in probes]
        lines.append((layer, *(value for pair in pairs for value in pair)))
    baselines = [
        f"{row.probe}: KL {format_measure(row.kl, 3)}, p@1 {format_measure(row.precision_at_1, 3)}"
        for row in rows
        if row.layer is None
    ]
    n = max((row.n for row in rows), default=0)
    caption = "; ".join([f"N = {offset} ({format_offset(offset)}), n = {n:,}", *baselines])
    columns = ("layer", *(f"{name} {measure}" for name in probes for measure in ("KL", "p@1")))
    return OffsetTable(offset, columns, lines, caption)


def headlines(evaluation: Evaluation) -> list[str]:
    """One sentence per offset, plain text: KL in the middle layer at N = 0, best precision@1 later.

    Offsets at which no probe reads a layer have no sentence.
    """
    sentences = []
    for offset in evaluation.offsets:
        rows = [row for row in evaluation.rows if row.offset == offset]
        if any(row.layer is not None for row in rows):
            sentences.append(_kl_headline(rows) if offset == 0 else _precision_headline(rows))
    return sentences


def _kl_headline(rows: list[EvaluationRow]) -> str:
    """KL of every lens in the middle layer, from the `rows` of N = 0, the smallest KL first."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    middle = layers[len(layers) // 2]
    best, *others = sorted((row for row in rows if row.layer == middle), key=kl_sort_key)
    beginning = (
        f"At layer {middle} the {label(best.probe)} is {_format_kl(best)} nats from the model"
    )
    parts = (f"the {label(row.probe)} {_format_kl(row)}" for row in others)
    return ", ".join([beginning, *parts]) + " (N = 0)."


def _precision_headline(rows: list[EvaluationRow]) -> str:
    """The best precision@1 of every probe, from the `rows` of one offset."""
    offset = rows[0].offset
    # Each lens at its best layer, the highest precision first; then the baselines.
    best_rows: dict[str, EvaluationRow] = {}
    for row in rows:
        if row.layer is not None:
            best = best_rows.get(row.probe)
            if best is None or precision_sort_key(row) > precision_sort_key(best):
                best_rows[row.probe] = row
    parts = [
        f"{_format_precision(row)} for the {label(row.probe)} (layer {row.layer})"
        for row in sorted(best_rows.values(), key=precision_sort_key, reverse=True)
    ]
    parts += [
        f"{_format_precision(row)} for the {label(row.probe)} (which reads {_tokens_read(row)})"
        for row in rows
        if row.layer is None
    ]
    beginning = f"At N = {offset} ({format_offset(offset)}) the best precision@1 is "
    return beginning + ", ".join(parts) + "; each layer was chosen on the same data."


def _tokens_read(row: EvaluationRow) -> str:
    """The tokens that a baseline without a layer reads, as text."""
    kind, offset = base_kind(row.probe), row.offset
    tokens_of_kind = {
        "unigram": "nothing",
        "lagged": "token t",
        "chain": "token t",
        "trigram": f"tokens t+{offset - 1} and t+{offset}",
    }
    return tokens_of_kind.get(kind, f"token t+{offset}")


def _format_kl(row: EvaluationRow) -> str:
    return format_measure(row.kl, 2) + format_interval(row.kl_low, row.kl_high, 2)


def _format_precision(row: EvaluationRow) -> str:
    interval = format_interval(row.precision_at_1_low, row.precision_at_1_high, 3)
    return format_measure(row.precision_at_1, 3) + interval


def format_interval(low: float | None, high: float | None, digits: int) -> str:
    """An interval as text with a space before: ` [0.12, 0.34]`; empty without an interval."""
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
