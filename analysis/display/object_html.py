"""Caches, heads, probes and evaluations as small HTML tables, for notebooks (`_repr_html_`).

Names in caches and models are other people's: everything is escaped. Colours are those of the
notebook, light or dark.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ...cache.errors import ResiduaError
from ...cache.format.manifest import SHORT_ID
from ...cache.number_ranges import format_ranges
from ..evaluation.metrics import format_measure
from ..evaluation.result import Evaluation
from ..report.probe_style import label, short_model_name
from ..report.tables import offset_tables

if TYPE_CHECKING:
    from ...cache.head.head import Head
    from ...cache.store.activation_cache import ActivationCache

MAX_ROWS = 40
"""Most rows of a table; the others are counted."""
UNITS = ("B", "kB", "MB", "GB")
CELL = "padding:0.1em 0.7em"
SHORT_METRICS = 6
"""Columns of a probe's metrics beside layer and offset."""


def cache_html(cache: "ActivationCache") -> str:
    """Model, data, shape, splits and size of a cache."""
    manifest = cache.manifest
    state = "complete" if cache.complete else f"{len(cache.committed)} of {cache.n_parts} parts"
    splits = ", ".join(
        f"{name} {len(cache.sequences(name)):,}" for name in ("train", "validation", "test")
    )
    facts = {
        "model": short_model_name(manifest.model_name),
        "data": manifest.data_name,
        "positions": f"{cache.positions:,} in {manifest.tokens.sequences:,} sequences ({splits})",
        "layers": f"{format_ranges(cache.layers)} of 0-{cache.n_blocks}, width {cache.d_model:,}",
        "vocabulary": f"{cache.vocab:,}",
        "stored": f"{manifest.capture.dtype} of {manifest.capture.compute_dtype}, "
        f"{_format_bytes(cache.bytes)}",
        "state": state,
        "path": str(cache.path),
    }
    return _facts_table(f"ActivationCache {cache.id[:SHORT_ID]}", facts)


def head_html(head: "Head") -> str:
    """Formula and shape of a head."""
    facts = {name: str(value) for name, value in head.describe().items() if value is not None}
    shape = {"maps": f"{head.d_model:,} to {head.vocab:,} logits"}
    return _facts_table("Head", {**shape, **facts, "size": _format_bytes(head.nbytes)})


def probe_html(probe: Any) -> str:
    """Parameters and origin of a probe, and the first columns of its metrics if it is fitted."""
    facts: dict[str, str] = {"parameters": " ".join(repr(probe).split())}
    if (cache_id := getattr(probe, "cache_id_", None)) is not None:
        facts["fitted on"] = (
            f"{getattr(probe, 'split_', None)} split of cache {cache_id[:SHORT_ID]}"
        )
    if (folder := getattr(probe, "folder_", None)) is not None:
        facts["loaded from"] = str(folder)
    text = _facts_table(f"{label(getattr(probe, 'kind', type(probe).__name__))}", facts)
    metrics = getattr(probe, "metrics", None)
    if callable(metrics):
        try:
            rows: Any = metrics()
        except (ResiduaError, ValueError, AttributeError):  # not fitted
            rows = []
        text += _metrics_table(rows)
    return text


def evaluation_html(evaluation: Evaluation) -> str:
    """A table of KL and precision@1 by layer for each offset, then the facts and notes."""
    facts = {
        "model": short_model_name(evaluation.model_name),
        "data": evaluation.data_name,
        "evaluated": f"{evaluation.split} split, {evaluation.n:,} positions of "
        f"{evaluation.sequences:,} sequences",
    }
    parts = [_facts_table(f"Evaluation on cache {evaluation.cache_id[:SHORT_ID]}", facts)]
    for table in offset_tables(evaluation):
        rows = [
            [
                "" if value is None else f"{value:,}" if index == 0 else format_measure(value, 3)
                for index, value in enumerate(row)
            ]
            for row in table.rows
        ]
        parts += [f"<p>{escape(table.caption)}</p>", _table(table.columns, rows)]
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in evaluation.facts())
    return "".join([*parts, f"<ul style='font-size:90%'>{sentences}</ul>"])


def _metrics_table(rows: Sequence[dict[str, Any]]) -> str:
    """The first columns of a probe's metrics; empty without rows."""
    if not rows:
        return ""
    names = [name for name in rows[0] if not isinstance(rows[0][name], dict | list)]
    names = sorted(names, key=lambda name: (name != "layer", name != "offset"))
    names = names[: 2 + SHORT_METRICS]
    return _table(names, [[_cell(row.get(name)) for name in names] for row in rows])


def _facts_table(title: str, facts: dict[str, str]) -> str:
    """A heading and a table of two columns."""
    rows = "".join(
        f"<tr><th style='text-align:left;{CELL}'>{escape(name)}</th>"
        f"<td style='text-align:left;{CELL}'>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{rows}</table></div>"


def _table(columns: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of right-aligned cells with a heading; at most `MAX_ROWS` rows."""
    head = "".join(f"<th style='{CELL}'>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:right;{CELL}'>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    more = len(rows) - MAX_ROWS
    rest = f"<p>and {more:,} more rows</p>" if more > 0 else ""
    return (
        "<div style='overflow-x:auto'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}</div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_bytes(count: int) -> str:
    """A number of bytes as text: `1.5 MB` (powers of 1000)."""
    value = float(count)
    for unit in UNITS:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
