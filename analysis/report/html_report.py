"""Writes an evaluation as one self-contained HTML file (`write_report`) or as PNGs (`write_pngs`).

`residua evaluate --html --png` calls both (console/actions.py). Pictures come from
interactive_figures.py and static_figures.py, texts from html_page.py, sentences from tables.py.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.files.json_files import make_folder, plain_value, write_atomically
from ...cache.format.manifest import SHORT_ID
from ..evaluation.confidence_buckets import BucketRow
from ..evaluation.kl_examples import KlExamples
from ..evaluation.lens_heatmap import Heatmap
from ..evaluation.metrics import EvaluationRow, format_measure
from ..evaluation.result import Evaluation
from .example_tables import examples_html
from .html_page import (
    BUCKET_NOTE,
    CONFIDENCE_NOTE,
    EXAMPLE_NOTE,
    GLOSSARY,
    KL_NOTE,
    MAP_NOTE,
    PRECISION_NOTE,
    TABLE_NOTE,
    buttons_html,
    glossary_html,
    legend_html,
    list_html,
    panel_html,
)
from .page_frame import fill_page
from .picture_files import write_figure
from .probe_style import (
    heatmap_title,
    label,
    measure_title,
    panel_title,
    passage_name,
    short_model_name,
    telling_confidence,
)
from .tables import PRECISIONS, format_interval, headlines

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


PASSAGES = 3
"""Passages of a report, to choose among."""
KEY = ("probe", "layer", "offset")
"""Columns that name the result of a row."""
COLUMNS = {
    "probe": "probe",
    "layer": "layer",
    "offset": "N",
    "n": "n",
    "n_undefined": "undefined",
    "kl": "KL, nats",
    "kl_interval": "95 % interval",
    "kl_reverse": "KL reverse",
    "precision_at_1": "p@1",
    "precision_at_1_interval": "95 % interval",
    "precision_at_5": "p@5",
    "precision_at_10": "p@10",
    "nll": "NLL",
    "surprisal": "surprisal",
    "n_text": "n text",
    "nll_text": "NLL text",
    "precision_at_1_text": "p@1 text",
    "precision_at_5_text": "p@5 text",
    "precision_at_10_text": "p@10 text",
}
"""Columns of the table of all rows, with their headings."""
BUCKET_COLUMNS = {
    "probe": "probe",
    "layer": "layer",
    "offset": "N",
    "bucket": "confidence",
    "share": "share",
    **{
        name: heading for name, heading in COLUMNS.items() if "text" not in name and name not in KEY
    },
}
"""Columns of the table of bucket rows, with their headings."""


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    *,
    cache: "ActivationCache | None" = None,
    heatmaps: Sequence[Heatmap] | None = None,
    examples: Sequence[KlExamples] | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write `evaluation` as one HTML file with plotly inside, and return its path.

    The file needs no network and no fonts and holds no date: the same evaluation gives the same
    bytes. The file describes `cache` (default: the evaluated cache), shows `heatmaps` (default:
    those of `PASSAGES` passages) and `examples` (default: `evaluation.kl_examples()`) under
    `title`, and quotes the command line `command`.
    """
    from plotly.offline import get_plotlyjs

    cache = cache or evaluation.cache
    heatmaps = evaluation.heatmaps(passages=PASSAGES) if heatmaps is None else heatmaps
    examples = evaluation.kl_examples() if examples is None else examples
    title = (
        title or f"What {short_model_name(evaluation.model_name)} already says in its middle layers"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts(evaluation, cache, command),
        "<ul class='headlines'>",
        *(f"<li>{escape(text)}</li>" for text in headlines(evaluation)),
        "</ul>",
        _section("KL to the model by layer", KL_NOTE, _curve_panels(evaluation, ("kl",))),
        _section("Precision@k by layer", PRECISION_NOTE, _curve_panels(evaluation, PRECISIONS)),
        _section("What each layer says, token by token", MAP_NOTE, _passages(heatmaps)),
        _section("Examples", EXAMPLE_NOTE, examples_html(examples) if examples else ""),
        _section("Precision by the model's confidence", CONFIDENCE_NOTE, _confidence(evaluation)),
        "<h2>All numbers</h2>",
        f"<p>{TABLE_NOTE}</p>",
        _table(evaluation.rows, COLUMNS),
        "<h2>All numbers by the model's confidence</h2>",
        f"<p>{BUCKET_NOTE}</p>",
        _table(evaluation.buckets, BUCKET_COLUMNS),
        "<h2>Glossary</h2>",
        glossary_html(GLOSSARY),
    ]
    page = fill_page(title, "\n".join(body), get_plotlyjs())
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, page.encode())
    return path


def write_pngs(
    folder: str | Path, evaluation: Evaluation, heatmaps: Sequence[Heatmap] = ()
) -> list[Path]:
    """Write `kl.png`, `precision_at_<k>.png`, `confidence.png` and a file per heatmap, 150 dpi.

    Heatmaps are named `heatmap_<probe>_N<offset>.png`. Returns the paths.
    """
    from . import static_figures as figures

    folder = Path(folder)
    make_folder(folder)

    # All figures by the name of their file.
    figure_of = {measure: figures.curves(evaluation, measure) for measure in ("kl", *PRECISIONS)}
    if telling_confidence(evaluation):
        figure_of["confidence"] = figures.confidence_figure(evaluation)
    for number, heatmap in enumerate(heatmaps):
        probe = "".join(letter if letter.isalnum() else "_" for letter in heatmap.probe)
        name = f"heatmap_{probe}_N{heatmap.offset}"
        name = f"{name}_{number}" if name in figure_of else name
        figure_of[name] = figures.heatmap_figure(heatmap)

    paths = []
    for name, figure in figure_of.items():
        paths.append(folder / f"{name}.png")
        write_figure(figure, paths[-1])
    return paths


def _facts(evaluation: Evaluation, cache: "ActivationCache | None", command: str | None) -> str:
    """HTML: a table of model, data, cache and sample, then the sentences of `facts`."""
    facts = {
        "model": evaluation.model_name,
        "data": evaluation.data_name,
        "cache": evaluation.cache_id[:SHORT_ID],
    }
    if cache is not None:
        facts["cache holds"] = f"{cache.positions:,} positions, layers 0-{cache.n_blocks}"
        facts["d_model, vocab"] = f"{cache.d_model:,}, {cache.vocab:,}"
    masked = evaluation.n < evaluation.positions
    of_all = f" (chosen among them) of the {evaluation.positions:,}" if masked else ""
    facts["evaluated"] = (
        f"{evaluation.split} split, {evaluation.n:,}{of_all} positions of "
        f"{evaluation.sequences:,} sequences, seed {evaluation.seed}"
    )
    if command:
        facts["command"] = command
    cells = (
        f"<tr><th>{escape(name)}</th><td>{_code(name, value)}</td></tr>"
        for name, value in facts.items()
    )
    sentences = (f"<li>{escape(sentence)}</li>" for sentence in evaluation.facts())
    table = "<table class='facts'>" + "".join(cells) + "</table>"
    return table + "<ul class='notes'>" + "".join(sentences) + "</ul>"


def _code(name: str, value: str) -> str:
    """HTML of a fact's value: ids and commands in a fixed-width font."""
    text = escape(value)
    return f"<code>{text}</code>" if name in ("cache", "command") else text


def _section(title: str, note: str, content: str) -> str:
    """HTML: a heading, a paragraph `note` and `content`; empty without content."""
    return f"<section><h2>{escape(title)}</h2><p>{note}</p>{content}</section>" if content else ""


def _curve_panels(evaluation: Evaluation, measures: Sequence[str]) -> str:
    """HTML: a panel per offset with a line per probe; buttons choose among several `measures`."""
    from .interactive_figures import panel_figure

    probes = {
        probe: any(row.layer is not None for row in evaluation.rows if row.probe == probe)
        for probe in evaluation.probes
        if any(row.probe == probe for row in evaluation.rows)
    }
    groups = []
    for number, measure in enumerate(measures):
        panels = (
            panel_html(
                panel_figure(evaluation, measure, offset),
                f"{measure}-{offset}",
                panel_title(evaluation, offset),
            )
            for offset in evaluation.offsets
        )
        hidden = " hidden" if number else ""
        groups.append(f"<div class='panels' data-part='{number}'{hidden}>{''.join(panels)}</div>")
    titles = [measure_title(measure) for measure in measures]
    choice = buttons_html(titles) if len(measures) > 1 else ""
    return f"<div>{choice}{legend_html(probes)}{''.join(groups)}</div>"


def _confidence(evaluation: Evaluation) -> str:
    """HTML: a panel per probe and offset at which the confidence makes a difference."""
    from .interactive_figures import confidence_panel

    panels = [
        panel_html(
            confidence_panel(evaluation, probe, offset),
            f"confidence-{number}",
            f"{label(probe)}, {panel_title(evaluation, offset)}",
        )
        for number, (probe, offset) in enumerate(telling_confidence(evaluation))
    ]
    return f"<div class='panels'>{''.join(panels)}</div>" if panels else ""


def _passages(heatmaps: Sequence[Heatmap]) -> str:
    """HTML: the heatmaps of one passage, and a list to choose among several passages."""
    from .interactive_figures import heatmap_figure

    by_passage: dict[str, list[Heatmap]] = {}
    for heatmap in heatmaps:
        by_passage.setdefault(passage_name(heatmap), []).append(heatmap)
    parts = []
    for number, passage in enumerate(by_passage.values()):
        panels = (
            panel_html(
                heatmap_figure(heatmap), f"map-{number}-{order}", heatmap_title(heatmap), wide=True
            )
            for order, heatmap in enumerate(passage)
        )
        hidden = " hidden" if number else ""
        parts.append(f"<div class='choice-of' data-part='{number}'{hidden}>{''.join(panels)}</div>")
    choice = list_html("passage", list(by_passage)) if len(by_passage) > 1 else ""
    return f"<div>{choice}{''.join(parts)}</div>" if parts else ""


def _table(rows: Sequence[EvaluationRow] | Sequence[BucketRow], columns: dict[str, str]) -> str:
    """HTML: a sortable table of `rows`; `columns` are fields with their headings."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns.values())
    body = "".join(
        "<tr>" + "".join(_cell_of(row, name) for name in columns) + "</tr>" for row in rows
    )
    return (
        f"<div class='scroll'><table class='numbers'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell_of(row: EvaluationRow, name: str) -> str:
    """HTML of one cell; `data-v` is the value that the table is sorted by."""
    if name.endswith("_interval"):
        measure = name.removesuffix("_interval")
        low, high = getattr(row, f"{measure}_low"), getattr(row, f"{measure}_high")
        text = format_interval(low, high, 3).strip()
        return f"<td data-v='{'' if low is None else low}'>{text}</td>"
    value = getattr(row, name)
    if isinstance(value, str):
        return f"<td class='name' data-v='{escape(label(value))}'>{escape(label(value))}</td>"
    if value is None or isinstance(value, float):
        # Infinite and undefined values are sorted to the end.
        number = "" if plain_value(value) is None else value
        return f"<td data-v='{number}'>{'' if value is None else format_measure(value, 3)}</td>"
    return f"<td data-v='{value}'>{value:,}</td>"
