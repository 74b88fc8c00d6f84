"""Writes causal bases as one self-contained HTML page (`write_basis_report`) or as a PNG.

Numbers and style come from span_curves.py, tables from basis_tables.py, pictures from
interactive_spectra.py and static_spectra.py, texts from basis_texts.py.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.files.json_files import make_folder, write_atomically
from ...cache.format.manifest import SHORT_ID
from ..basis import LayerReading
from ..report.html_page import figure_html, glossary_html
from ..report.page_frame import STYLE, fill_page
from ..report.picture_files import write_figure
from ..report.probe_style import short_model_name
from .basis_tables import directions_table, span_table, summary_table
from .basis_texts import BASIS_GLOSSARY, BASIS_STYLE, INTRODUCTION, MODEL_GLOSSARY, SUMMARY_NOTE
from .span_curves import check_metrics, estimates_by_k, format_estimate

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


def write_basis_report(
    path: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    readings: Mapping[int, LayerReading] | None = None,
    model_influence: Mapping[int, Mapping[str, Any]] | None = None,
    cache: "ActivationCache | None" = None,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write causal bases as one HTML file with plotly inside, and return its path.

    `rows` are the rows of `CausalBasis.metrics()`, one per layer; `readings` come from
    `read_directions`, and `model_influence` maps a layer to its influence in the model (keys:
    `span_curves.INFLUENCE_KEYS`). The page describes `cache`, lists further `facts` by name, and
    quotes the command line `command`. The file needs no network and holds no date: equal numbers
    give equal bytes. Raises `UsageError` for rows or influences without their keys.
    """
    from plotly.offline import get_plotlyjs

    readings = readings or {}
    influences = _influences_by_layer(model_influence)
    rows = sorted(rows, key=lambda row: row.get("layer", 0))
    check_metrics(rows, influences)
    model_name = short_model_name(cache.manifest.model_name) if cache is not None else ""
    title = title or f"Causal bases{f' of {model_name}' if model_name else ''}"
    links = (f"<a href='#layer-{row['layer']:d}'>layer {row['layer']:d}</a>" for row in rows)
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts_table(cache, facts or {}, command),
        f"<p>{escape(INTRODUCTION)}</p>",
        f"<p class='contents'>{''.join(links)}<a href='#glossary'>glossary</a></p>",
        "<h2>All layers</h2>",
        f"<p>{escape(SUMMARY_NOTE)}</p>",
        summary_table(rows, readings, influences),
        *(_layer_section(row, readings, influences.get(row["layer"])) for row in rows),
        "<h2 id='glossary'>Glossary</h2>",
        glossary_html(BASIS_GLOSSARY | (MODEL_GLOSSARY if influences else {})),
    ]
    page = fill_page(title, "\n".join(body), get_plotlyjs(), STYLE + BASIS_STYLE)
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, page.encode())
    return path


def write_basis_png(
    path: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    model_influence: Mapping[int, Mapping[str, Any]] | None = None,
    model_name: str | None = None,
) -> Path:
    """Write the spectra of all layers as one PNG of small multiples, 150 dpi; return its path.

    Parameters are those of `write_basis_report`; `model_name` stands in the title.
    """
    from .static_spectra import spectra

    influences = _influences_by_layer(model_influence)
    rows = sorted(rows, key=lambda row: row.get("layer", 0))
    check_metrics(rows, influences)
    path = Path(path)
    make_folder(path.parent)
    write_figure(spectra(rows, influences, model_name), path)
    return path


def _influences_by_layer(
    model_influence: Mapping[int, Mapping[str, Any]] | None,
) -> dict[int, Mapping[str, Any]]:
    """`model_influence` by whole numbers: JSON has keys of text."""
    return {int(layer): influence for layer, influence in (model_influence or {}).items()}


def _facts_table(
    cache: "ActivationCache | None", facts: Mapping[str, str], command: str | None
) -> str:
    """HTML: a table of model, data and cache, then of `facts` and the command line."""
    named: dict[str, str] = {}
    if cache is not None:
        named = {
            "model": cache.manifest.model_name,
            "data": cache.manifest.data_name,
            "cache": cache.id[:SHORT_ID],
            "cache holds": f"{cache.positions:,} positions, layers 0-{cache.n_blocks}",
            "d_model, vocab": f"{cache.d_model:,}, {cache.vocab:,}",
        }
    named |= facts
    if command:
        named["command"] = command
    cells = (
        f"<tr><th>{escape(name)}</th><td><code>{escape(str(value))}</code></td></tr>"
        if name in ("cache", "command")
        else f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in named.items()
    )
    return f"<table class='facts'>{''.join(cells)}</table>"


def _layer_section(
    row: Mapping[str, Any],
    readings: Mapping[int, LayerReading],
    influence: Mapping[str, Any] | None,
) -> str:
    """HTML: heading, sentences, figure and tables of one layer."""
    from .interactive_spectra import layer_figure

    layer = int(row["layer"])
    reading = readings.get(layer)
    sentences = _layer_sentences(row, reading, influence)
    parts = [
        f"<h2 id='layer-{layer}'>Layer {layer}</h2>",
        "<ul class='notes'>",
        *(f"<li>{escape(sentence)}</li>" for sentence in sentences),
        "</ul>",
        figure_html(layer_figure(row, influence), f"figure-{layer}"),
        span_table(row, influence),
        "<h3>Directions</h3>",
        directions_table(row, reading, influence),
    ]
    return "\n".join(parts)


def _layer_sentences(
    row: Mapping[str, Any], reading: LayerReading | None, influence: Mapping[str, Any] | None
) -> list[str]:
    """What was measured on how many positions, and what persists from the previous layer."""
    k = int(row["k"])
    span = estimates_by_k(row["span"])[k]
    sentences = [
        f"Ablating all {k} directions changes the lens by "
        f"{format_estimate(span['kl'], span['low'], span['high'])} nats on n = {row['n_test']:,} "
        f"held-out positions (95 % interval by document); fitted on n = {row['n']:,}, method "
        f"{row['method']}, {row['metric']} metric, {row['evaluations']:,} evaluations, "
        f"{row['cpu_seconds']:.1f} CPU seconds."
    ]
    if influence is not None:
        positions = f" on n = {influence['n']:,} positions" if influence.get("n") else ""
        model_span = estimates_by_k(influence["model_span"]).get(k)
        if model_span is not None:
            estimate = format_estimate(model_span["kl"], model_span["low"], model_span["high"])
            sentences.append(f"In the model the same ablation gives {estimate} nats{positions}.")
        for name, key, value in (
            ("Spearman correlation of the influences in lens and model", "spearman", "value"),
            ("Stimulus-response alignment", "alignment", "mean"),
            ("Alignment of the span", "span_alignment", "mean"),
        ):
            if (measure := influence[key]) is not None:
                estimate = format_estimate(measure[value], measure["low"], measure["high"])
                n = f", n = {measure['n']:,}" if measure.get("n") else ""
                sentences.append(f"{name}: {estimate}{n}.")
    if reading is not None:
        if reading.overlap is not None:
            chance = reading.chance_overlap
            of_chance = "" if chance is None else f" (random directions: {chance:.2f})"
            sentences.append(
                f"The coordinates overlap with those of layer {reading.previous_layer} by "
                f"{reading.overlap:.2f}{of_chance}."
            )
        sentences.append(
            f"Passages and matches are of n = {reading.n:,} random positions of the "
            f"{reading.split} split, tokens of n = {reading.n_token_rows:,} among them."
        )
    return sentences
