"""Writes what an evaluation found: the report and the pictures."""

from pathlib import Path

from ..cache.disk import check_target
from ..cache.errors import UsageError
from .evaluate import Evaluation


def check(html: Path | None, png: Path | None) -> None:
    """Raise `UsageError` unless a report can be written to `html` and pictures below `png`."""
    if html is not None:
        if html.is_dir():
            raise UsageError(f"{html} is a folder; name a file such as {html / 'report.html'}")
        check_target(html)
    if png is not None:
        check_target(png / "lenses.png")


def write(
    evaluation: Evaluation, html: Path | None, png: Path | None, command: str | None = None
) -> list[str]:
    """Write the report to `html` and the pictures to the folder `png`; returns the files."""
    if html is None and png is None:
        return []
    from .report import write_pngs

    heatmaps = evaluation.heatmaps()
    written = []
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        written.append(str(evaluation.to_html(html, heatmaps=heatmaps, command=command)))
    if png is not None:
        written += [str(path) for path in write_pngs(png, evaluation, heatmaps)]
    return written
