"""The page of a study, or of several: question, method, picture, what it says, numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ....cache.files.json_files import make_folder, plain_value, write_atomically
from ....cache.format.manifest import SHORT_ID
from ...report.html_page import panel_html
from ...report.page_frame import STYLE, fill_page
from .plotly_figures import draw_single_panel
from .study_cells import cell_text
from .study_colors import series_colors, series_labels
from .study_figures import HeatPanel, StudyFigure
from .study_result import StudyResult, StudyTable

STUDY_STYLE = (
    STYLE
    + """
.study { border-top: 3px solid var(--rule); margin-top: 44px; padding-top: 4px; }
.study:first-of-type { border: 0; margin-top: 0; }
.study .panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.study .panel:has(.wide) { grid-column: 1 / -1; }
nav ul { columns: 2; font-size: 14px; }
.skipped code { display: block; margin-top: 2px; }
"""
)
DETAILS = "Everything that was measured is in the tables of --csv and --json."


def write_study_page(
    results: Sequence[StudyResult],
    path: Path,
    command: str | None = None,
    skipped: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write one page of all `results` to `path`; `skipped` maps names of studies to reasons."""
    from plotly.offline import get_plotlyjs

    title = title or (results[0].title if len(results) == 1 else "Studies of a cache")
    body = [f"<h1>{escape(title)}</h1>"] if len(results) != 1 else []
    if len(results) > 1:
        links = "".join(
            f'<li><a href="#{escape(result.study)}">{escape(result.title)}</a></li>'
            for result in results
        )
        body.append(f"<nav><ul>{links}</ul></nav>")
    body += [_study_html(result, is_alone=len(results) == 1) for result in results]
    if skipped:
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(reason)}</dd>" for name, reason in skipped.items()
        )
        body.append(f'<h2>Not answered by this cache</h2><dl class="skipped">{rows}</dl>')
    if command:
        body.append(f"<p>Made by <code>{escape(command)}</code></p>")
    make_folder(path.parent)
    page = fill_page(title, "\n".join(body), get_plotlyjs(), STUDY_STYLE)
    write_atomically(path, page.encode())
    return path


def _study_html(result: StudyResult, is_alone: bool) -> str:
    """One study, from its question down to its numbers."""
    level = "h1" if is_alone else "h2"
    says = "".join(f"<li>{escape(sentence)}</li>" for sentence in result.says)
    limits = [*result.does_not_say, *result.notes]
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in limits)
    parts = [
        f'<section class="study" id="{escape(result.study)}">',
        f"<{level}>{escape(result.title)}</{level}>",
        f"<p>{_subject_html(result)}</p>",
        f"<h3>Question</h3><p>{escape(result.question)}</p>",
        f"<h3>Method</h3><p>{escape(result.method)}</p>",
    ]
    if result.figures:
        parts.append(_figure_html(result, result.figures[0]))
    parts.append(f'<h3>What it says</h3><ul class="headlines">{says}</ul>')
    if notes:
        parts.append(f'<h3>What it does not say</h3><ul class="notes">{notes}</ul>')
    parts += [_figure_html(result, figure) for figure in result.figures[1:]]
    parts.append("<h3>Numbers</h3>")
    parts += [table_html(table) for table in result.tables if table.rows]
    parts.append(f'<p class="notes">{DETAILS}</p></section>')
    return "\n".join(parts)


def _subject_html(result: StudyResult) -> str:
    """What the study read, in one line."""
    subject = result.subject
    caches = ", ".join(f"<code>{escape(cache[:SHORT_ID])}</code>" for cache in subject.caches)
    plural = "s" if len(subject.caches) > 1 else ""
    settings = ", ".join(
        f"{escape(str(name).replace('_', ' '))} {escape(str(plain_value(value)))}"
        for name, value in result.settings.items()
        if value is not None
    )
    line = (
        f"Cache{plural} {caches} of {escape(subject.model_name)}, {escape(subject.data_name)}, "
        f"split {escape(subject.split)}: n = {subject.n:,} {escape(subject.n_of)}; intervals "
        f"(95 %, bootstrap) resample {subject.n_units:,} {escape(subject.units)}s."
    )
    if subject.probes:
        line += " Probes: " + "; ".join(
            f"{escape(name)} is {escape(what)}" for name, what in subject.probes.items()
        )
        line += "."
    return line + (f" Settings: {settings}." if settings else "")


def _figure_html(result: StudyResult, figure: StudyFigure) -> str:
    """Panels of a figure that wrap where the window is narrow, with the legend above."""
    labels = series_labels(figure)
    keys = "".join(
        f'<li><button aria-pressed="true" value="{escape(name)}"><svg width="22" height="8" '
        f'data-color="{color}"><path d="M0 4h22" stroke="currentColor" stroke-width="3"/></svg>'
        f"{escape(name)}</button></li>"
        for name, (color, _) in series_colors(labels).items()
    )
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    parts = []
    for number, row in enumerate(figure.rows):
        drawn = []
        for column, panel in enumerate(row):
            name = f"{result.study}-{figure.name}-{number}-{column}"
            is_wide = isinstance(panel, HeatPanel)
            drawn.append(
                panel_html(draw_single_panel(figure, panel), name, panel.title, wide=is_wide)
            )
        parts.append(f'<div class="panels">{"".join(drawn)}</div>')
    return (
        f"<div><h3>{escape(figure.name.replace('-', ' ').capitalize())}</h3>"
        f"<p>{escape(figure.caption)}</p>{legend}{''.join(parts)}</div>"
    )


def table_html(table: StudyTable) -> str:
    """A table that sorts by a click on a heading."""
    names = list(table.headings)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings.values())
    lines = []
    for row in table.rows:
        cells = "".join(_cell_html(getattr(row, name)) for name in names)
        lines.append(f"<tr>{cells}</tr>")
    return (
        f"<p>{escape(table.title)}</p>"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell_html(value: Any) -> str:
    """One cell; `data-v` is what it is sorted by."""
    key = value[0] if isinstance(value, tuple) else value
    is_number = isinstance(key, int | float) and not isinstance(key, bool)
    kind = "" if is_number or key is None else ' class="name"'
    sorted_by = "" if key is None else escape(str(key))
    return f'<td{kind} data-v="{sorted_by}">{escape(cell_text(value))}</td>'


def short_html(result: StudyResult, most_rows: int = 12) -> str:
    """Question, sentences and the first rows of the main table, without a picture."""
    says = "".join(f"<li>{escape(sentence)}</li>" for sentence in result.says)
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in result.does_not_say)
    table = result.tables[0]
    first = replace(table, rows=table.rows[:most_rows])
    left = len(table.rows) - len(first.rows)
    more = f"<p>{left:,} more rows in <code>to_dataframe()</code></p>" if left else ""
    return (
        f"<div><h4>{escape(result.title)}</h4><p>{escape(result.question)}</p><ul>{says}</ul>"
        f"<ul>{notes}</ul>{table_html(first)}{more}</div>"
    )
