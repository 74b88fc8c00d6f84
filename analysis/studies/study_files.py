"""The files of a study: its page, its picture, its table."""

from pathlib import Path

from ...cache.errors import UsageError
from ...cache.files.disk_errors import check_file_target
from ...cache.optional_libraries import require_extra
from .essential_layers import EssentialLayers, write_csv


def check_study_files(html: Path | None, png: Path | None, csv: Path | None) -> None:
    """Raise `UsageError` unless the files can be written; `MissingLibraryError` for the extra."""
    require_extra("fit", "the study")
    if html is not None or png is not None:
        require_extra("report", "a picture")
    if png is not None and png.suffix.lower() != ".png":
        raise UsageError(f"the picture is a PNG file: name it {png.with_suffix('.png')}")
    for target, name in ((html, "study.html"), (png, "study.png"), (csv, "study.csv")):
        if target is not None:
            check_file_target(target, name)


def write_study_files(
    result: EssentialLayers,
    html: Path | None,
    png: Path | None,
    csv: Path | None,
    command: str | None = None,
) -> list[str]:
    """Write the files that have a path; returns the paths. The page quotes `command`."""
    written: list[Path] = []
    if csv is not None:
        written.append(write_csv(result, csv))
    if html is not None or png is not None:
        from .essential_layers_page import draw_essential_layers, write_essential_layers_page

        if html is not None:
            written.append(write_essential_layers_page(result, html, command))
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            draw_essential_layers(result).savefig(png, dpi=150)
            written.append(png)
    return [str(path) for path in written]
