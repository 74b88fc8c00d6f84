"""Writing of matplotlib figures as PNG files, whole or not at all."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.files.json_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
"""Dots per inch of all pictures."""


def write_figure(figure: "Figure", path: Path) -> None:
    """Write `figure` to the PNG file `path`; an existing file stays until the new one is whole."""
    picture = BytesIO()
    # No version or date in the file: equal numbers give equal bytes.
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(path, picture.getvalue())
