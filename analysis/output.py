"""Writes what an evaluation found: the report and the pictures."""

from pathlib import Path

from .evaluate import Evaluation


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
