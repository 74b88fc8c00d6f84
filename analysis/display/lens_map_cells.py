"""What the pictures of `LensMaps` share: texts of cells, titles, and colours of each measure.

lens_map_figures.py draws with matplotlib, interactive_lens_maps.py with plotly.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..report.probe_style import SCALE, format_offset, label, letter_color, shorten
from .lens_maps import LensMap, LensMaps

AXIS_TITLES = {
    "probability": "probability of the token shown",
    "entropy": "entropy, nats",
    "kl": "KL(model ‖ lens), nats",
    "rank": "rank of the model's token (1: likeliest)",
}
"""Title of the colour bar by measure."""
DIFFERENCE_SCALE = (
    (0.0, "#8c2d04"),
    (0.25, "#f4a582"),
    (0.5, "#ffffff"),
    (0.75, "#92c5de"),
    (1.0, "#08457e"),
)
"""Colours of a difference, from negative to positive."""
OUTLINE = "#d9480f"
"""Colour of the outline of cells that agree with the last layer; on a difference, whose colours are
alike, outlines have the colour of the letters."""
LETTERS = 8
"""Letters of a token in a cell."""


@dataclass(frozen=True)
class CellColors:
    """How values of a measure become colours."""

    scale: tuple[tuple[float, str], ...]
    """Share of the scale, 0 to 1 ascending, with its colour."""
    low: float
    """Value at the share 0."""
    high: float
    """Value at the share 1."""
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where `value` is on the scale, 0 to 1; NaN for NaN."""
        if not math.isfinite(value):
            return math.nan
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def letters_on(self, value: float) -> str:
        """Colour of letters on the colour of `value`; black for NaN, whose cell is white."""
        share = self.share(value)
        return letter_color(share, self.scale) if math.isfinite(share) else "#000000"


def cell_colors(values: np.ndarray, measure: str, is_difference: bool) -> CellColors:
    """The colours of a map: dark is a lens that is near the model, or sure."""
    finite = values[np.isfinite(values)]
    if is_difference:
        most = float(np.abs(finite).max(initial=0.0)) or 1.0
        return CellColors(DIFFERENCE_SCALE, -most, most)
    if measure == "probability":
        return CellColors(SCALE, 0.0, 1.0)
    # Entropy, KL and rank: small is good, and dark.
    scale = tuple((1 - at, name) for at, name in reversed(SCALE))
    largest = float(finite.max(initial=0.0))
    if measure == "rank":
        return CellColors(scale, 1.0, max(10.0, largest), is_log=True)
    return CellColors(scale, 0.0, largest or 1.0)


def shows_tracked_number(maps: LensMaps) -> bool:
    """Whether cells show a number of the tracked token, in place of a token."""
    return maps.tracked is not None and maps.measure in ("probability", "rank")


def cell_lines(entry: LensMap, maps: LensMaps, row: int, column: int) -> list[str]:
    """Lines of a cell: the likeliest token, of a difference those of both lenses where they differ;
    or the number of a tracked token."""
    if shows_tracked_number(maps):
        value = entry.values[maps.measure][row, column]
        if not math.isfinite(value):
            return ["-"]
        if entry.is_difference:
            return [f"{value:+.2f}" if maps.measure == "probability" else f"{value:+,.0f}"]
        return [_short_number(value, maps.measure)]
    tops = entry.top[row][column]
    differs = entry.is_difference and not entry.agrees[row, column]
    return [shorten(top, LETTERS) for top in (tops if differs else tops[:1])]


def _short_number(value: float, measure: str) -> str:
    """A probability or a rank in few letters."""
    if measure == "rank":
        return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"
    return f"{value:.2f}" if value >= 0.005 else f"{value:.0e}".replace("e-0", "e-")


def outline_color(entry: LensMap, colors: CellColors, value: float) -> str:
    """Colour of the outline of a cell with `value`."""
    return colors.letters_on(value) if entry.is_difference else OUTLINE


def is_outlined(entry: LensMap, row: int, column: int) -> bool:
    """Whether a cell is outlined: it agrees with the last layer.

    Of a difference, the cells where the lenses disagree are the ones to look at.
    """
    return bool(entry.agrees[row, column]) != entry.is_difference


def map_title(entry: LensMap, maps: LensMaps) -> str:
    """Lens, offset and passage of a map, and which cells are outlined."""
    outlined = "they disagree" if entry.is_difference else "as the last layer says"
    return f"{map_name(entry, maps)}; outlined: {outlined}"


def map_name(entry: LensMap, maps: LensMaps) -> str:
    """Lens, offset and passage of a map."""
    offset = f"N = {entry.offset} ({format_offset(entry.offset)})"
    return f"{lens_label(entry)} at {offset}; {maps.passage}"


def lens_label(entry: LensMap) -> str:
    """The lens of a map for people; of a difference both lenses."""
    if entry.is_difference:
        return " - ".join(label(part) for part in entry.lens.split(" - "))
    return label(entry.lens)


def bar_title(entry: LensMap, maps: LensMaps) -> str:
    """Title of the colour bar."""
    title = AXIS_TITLES[maps.measure]
    if shows_tracked_number(maps):
        title = f"{maps.measure} of {maps.tracked}"
    return f"difference of {title}" if entry.is_difference else title
