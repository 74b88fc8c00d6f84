"""HTML tables of the page on causal bases: all layers, spans of a layer, directions of a layer.

basis_page.py calls `summary_table`, `span_table` and `directions_table`. All text is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ...cache.files.json_files import plain_value
from ..basis import DirectionMatch, DirectionReading, LayerReading, Passage, TokenChange
from .span_curves import (
    Estimate,
    SpanCurve,
    estimates_by_k,
    finite_number,
    format_estimate,
    format_number,
    span_curves,
)

Influences = Mapping[int, Mapping[str, Any]]
"""Layer -> influence of its basis in the model, see `INFLUENCE_KEYS`."""


def summary_table(
    rows: Sequence[Mapping[str, Any]],
    readings: Mapping[int, LayerReading],
    model_influence: Influences,
) -> str:
    """A sortable table with one row per layer.

    Columns of the model and of the overlap are left out if no layer has them.
    """
    headings = ["layer", "k", "method", "metric"]
    headings += ["span KL, nats", "PCA", "random", "ratio to PCA"]
    if model_influence:
        headings += ["span KL in the model", "Spearman", "alignment", "alignment of the span"]
    has_overlap = any(reading.overlap is not None for reading in readings.values())
    if has_overlap:
        headings += ["overlap", "chance"]
    headings += ["n fit", "n held out", "evaluations", "CPU seconds"]
    lines = []
    for row in rows:
        layer, k = int(row["layer"]), int(row["k"])
        causal, pca, random = (
            estimates_by_k(row[name]).get(k) for name in ("span", "pca", "random")
        )
        link = f"<td data-v='{layer}'><a href='#layer-{layer}'>{layer}</a></td>"
        cells = [link, _count_cell(k), _text_cell(row["method"]), _text_cell(row["metric"])]
        cells += [_estimate_cell(estimate) for estimate in (causal, pca, random)]
        cells.append(_number_cell(_kl_ratio(causal, pca)))
        if model_influence:
            influence = model_influence.get(layer, {})
            cells.append(_estimate_cell(estimates_by_k(influence.get("model_span", {})).get(k)))
            cells.append(_estimate_cell(influence.get("spearman"), "value"))
            cells.append(_estimate_cell(influence.get("alignment"), "mean"))
            cells.append(_estimate_cell(influence.get("span_alignment"), "mean"))
        if has_overlap:
            reading = readings.get(layer)
            cells.append(_number_cell(reading and reading.overlap))
            cells.append(_number_cell(reading and reading.chance_overlap))
        cells += [_count_cell(row[name]) for name in ("n", "n_test", "evaluations")]
        cells.append(_number_cell(row["cpu_seconds"]))
        lines.append(cells)
    return _sortable_table(headings, lines)


def span_table(row: Mapping[str, Any], influence: Mapping[str, Any] | None) -> str:
    """A sortable table of the KL of ablating the first k directions, one row per k."""
    curves = {curve.label: curve for curve in span_curves(row)}
    if influence is not None:
        same_positions = SpanCurve("causal", False, estimates_by_k(influence["lens_span"]))
        curves["causal basis, lens, positions of the model"] = same_positions
        curves |= {c.label: c for c in span_curves(row, influence) if c.in_model}
    ks = sorted({k for curve in curves.values() for k in curve.ks})
    lines = [
        [_count_cell(k), *(_estimate_cell(curve.estimates.get(k)) for curve in curves.values())]
        for k in ks
    ]
    return _sortable_table(["k", *curves], lines)


def directions_table(
    row: Mapping[str, Any], reading: LayerReading | None, influence: Mapping[str, Any] | None
) -> str:
    """A table of the directions of a layer: numbers, tokens, passages, best match.

    Columns without an entry are left out.
    """
    directions = reading.directions if reading is not None else ()
    columns: dict[str, tuple[str, list[str]]] = {
        "direction": ("number", [str(number) for number in range(row["k"])]),
        "energy, nats": ("number", [_number_html(value) for value in row["energies"]]),
        "influence, nats": ("number", [_number_html(value) for value in row["influences"]]),
    }
    if influence is not None:
        for place in ("lens", "model"):
            values = [_number_html(value) for value in influence[f"{place}_influences"]]
            name = "in the model" if place == "model" else "in the lens, same positions"
            columns[name] = ("number", values)
    if directions:
        columns["promotes"] = ("tokens", [_tokens_html(entry.promoted) for entry in directions])
        columns["suppresses"] = ("tokens", [_tokens_html(entry.suppressed) for entry in directions])
        columns["passages with the largest and the smallest coordinate"] = (
            "passages",
            [_passages_html(entry) for entry in directions],
        )
        if any(entry.match for entry in directions):
            columns[f"best match in layer {reading.previous_layer if reading else ''}"] = (
                "match",
                [_match_html(entry.match) for entry in directions],
            )
    head = "".join(f"<th class='{css}'>{escape(name)}</th>" for name, (css, _) in columns.items())
    body = "".join(
        "<tr>"
        + "".join(f"<td class='{css}'>{cells[number]}</td>" for css, cells in columns.values())
        + "</tr>"
        for number in range(row["k"])
    )
    return f"<table class='directions'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tokens_html(changes: Iterable[TokenChange]) -> str:
    """HTML of tokens with the change of their log-probability, one per line."""
    return "".join(
        f"<div title='token {int(entry.token)}'><bdi>{escape(entry.label)}</bdi>"
        f"<span class='change'>{entry.change:+.2f}</span></div>"
        for entry in changes
    )


def _passages_html(reading: DirectionReading) -> str:
    """HTML of the passages at both ends of a direction, the token at the position marked."""
    ends = ("".join(map(_passage_html, passages)) for passages in (reading.highest, reading.lowest))
    return "<hr>".join(end for end in ends if end)


def _passage_html(passage: Passage) -> str:
    before, token, after = (escape(x) for x in (passage.before, passage.token, passage.after))
    title = f"position {int(passage.position)}, document {int(passage.document)}"
    return (
        f"<div class='passage' title='{title}'><span class='sd'>{passage.coordinate:+.1f} sd</span>"
        f"<bdi>{before}<mark>{token}</mark>{after}</bdi></div>"
    )


def _match_html(match: DirectionMatch | None) -> str:
    if match is None:
        return ""
    return (
        f"direction {int(match.direction)}<br>r = {match.correlation:+.2f}<br>"
        f"cosine {match.cosine:+.2f}"
    )


def _sortable_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """HTML of a table of cells that a click on a heading sorts."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return (
        "<div class='scroll'><table class='numbers'><thead><tr>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text_cell(text: Any) -> str:
    return f"<td class='name' data-v='{escape(str(text))}'>{escape(str(text))}</td>"


def _count_cell(number: int) -> str:
    return f"<td data-v='{int(number)}'>{int(number):,}</td>"


def _number_cell(value: Any) -> str:
    """A cell that is empty without a value; `data-v` is the value that the table is sorted by."""
    if value is None:
        return "<td data-v=''></td>"
    return f"<td data-v='{_sort_value(value)}'>{format_number(value)}</td>"


def _estimate_cell(estimate: Estimate | None, name: str = "kl") -> str:
    """A cell with a measure and its interval, empty without an estimate."""
    if estimate is None:
        return "<td data-v=''></td>"
    text = format_estimate(estimate[name], estimate["low"], estimate["high"])
    if estimate.get("n") is not None:
        text += f", n = {int(estimate['n']):,}"
    return f"<td data-v='{_sort_value(estimate[name])}'>{text}</td>"


def _sort_value(value: Any) -> str:
    number = plain_value(finite_number(value))
    return "" if number is None else repr(number)


def _number_html(value: Any) -> str:
    """HTML of a number with three digits, all of its digits on hovering."""
    return f"<span title='{_sort_value(value)}'>{format_number(value)}</span>"


def _kl_ratio(estimate: Estimate | None, other: Estimate | None) -> float | None:
    """Ratio of two KL; None without both, or of a zero."""
    values = [finite_number(each["kl"]) if each is not None else None for each in (estimate, other)]
    return values[0] / values[1] if values[0] is not None and values[1] else None
