"""Names, colours, markers and line styles of probes and measures in pictures and tables.

static_figures.py (matplotlib) and interactive_figures.py (plotly) take their style from here, so
that a probe looks the same in both. A probe's name is `kind[/control][ number]`: `ridge`,
`ridge 2`, `ridge/shuffled`; or what the user gave, a `ProbeName`, which knows its kind.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from ..evaluation.confidence_buckets import buckets_differ
from ..evaluation.lens_heatmap import Heatmap
from ..evaluation.metrics import KS, EvaluationRow
from ..evaluation.probe_names import ProbeName
from ..evaluation.result import Evaluation

MORE_STROKES = (
    ((0, (8, 2)), "longdash"),
    ((0, (8, 2, 1, 2)), "longdashdot"),
    ((0, (4, 1)), "8px,2px"),
)
"""Strokes of the second probe of a kind and further ones, for matplotlib and plotly."""
MORE_MARKERS = (("X", "x"), ("P", "cross"), ("*", "star"), ("p", "pentagon"), ("h", "hexagon"))
"""Markers of the second probe of a kind and further ones, for matplotlib and plotly."""
LABELS = {
    "logit": "logit lens",
    "ridge": "ridge lens",
    "lens": "tuned lens",
    "future": "future lens",
    "jacobian": "Jacobian lens",
    "vocab": "vocabulary probe",
    "mlp": "MLP probe",
    "bigram": "bigram",
    "chain": "bigram chain",
    "lagged": "lagged bigram",
    "marginal": "marginalised bigram",
    "trigram": "trigram",
    "unigram": "unigram",
    "shuffled": "shuffled states",
    "permuted": "permuted labels",
    "next-token": "with the next token",
}
"""Names of kinds of probes and of controls, for people."""
# The palette of Okabe and Ito (2008) can be told apart with every common colour blindness.
COLORS = {
    "logit": "#D55E00",
    "ridge": "#0072B2",
    "lens": "#009E73",
    "future": "#CC79A7",
    "jacobian": "#6A3D9A",
    "vocab": "#E69F00",
    "mlp": "#7A0177",
    "bigram": "#555555",
    "chain": "#B5A36A",
    "lagged": "#8C6D31",
    "marginal": "#8856A7",
    "trigram": "#000000",
    "unigram": "#999999",
}
"""Colours of kinds of probes."""
OTHER_COLOR = "#56B4E9"
"""Colour of other kinds."""
SHADES = ((0, 0.45), (255, 0.4), (0, 0.7))
"""Black (0) or white (255), and how much of it the colour of `ridge 2`, `ridge 3`, ... has."""
MARKERS = {
    "logit": ("o", "circle"),
    "ridge": ("s", "square"),
    "lens": ("^", "triangle-up"),
    "future": ("D", "diamond"),
    "jacobian": ("h", "hexagon"),
    "vocab": ("v", "triangle-down"),
    "mlp": ("X", "x"),
}
"""Markers of kinds of probes, for matplotlib and plotly."""
STROKES = {"shuffled": (":", "dot"), "permuted": ("-.", "dashdot"), "next-token": ("--", "dash")}
"""Strokes of controls, for matplotlib and plotly."""
MEASURES = {
    "kl": "KL(model ‖ probe), nats",
    **{f"precision_at_{k}": f"precision@{k} (share of positions)" for k in KS},
}
"""Measures that are drawn by layer, with the title of their axis."""
KL_FLOOR = 1e-3
"""Smaller KL, in nats, is that of the model itself and rounding."""
SCALE = ((0.0, "#ffffff"), (0.35, "#c6e5f5"), (0.7, "#4aa3d0"), (1.0, "#08457e"))
"""Colour of a cell by probability; lightness falls evenly, so that grey prints are readable."""
CONFIDENCE_MEASURE = "precision_at_1"
"""Measure that is drawn by confidence."""
BUCKET_COLORS = ("#8fc1e3", "#3f93cf", "#1a5fa5", "#08264d")
"""Colours of the confidence buckets, darker for higher confidence; lightness falls evenly."""
BUCKET_MARKERS = (("v", "triangle-down"), ("s", "square"), ("o", "circle"), ("^", "triangle-up"))
"""Markers of the confidence buckets, for matplotlib and plotly."""
CELL_LETTERS = 8
"""Letters of a token shown in a cell."""


def label(probe: str) -> str:
    """A probe's name for people: `ridge lens 2` of `ridge 2`, `ridge lens, shuffled states` of
    `ridge/shuffled`; a name that the user gave as it is."""
    if isinstance(probe, ProbeName) and probe.is_given:
        return str(probe)
    kind, _, number = probe.partition(" ")
    names = ", ".join(LABELS.get(part, part) for part in kind.split("/"))
    return f"{names} {number}".strip()


def base_kind(probe: str) -> str:
    """The kind of a probe without its number and its control: `ridge` of `ridge/shuffled 2`."""
    return _kind_and_control(probe).partition("/")[0]


def _kind_and_control(probe: str) -> str:
    """The kind of a probe with its control: `ridge/shuffled` of `ridge/shuffled 2`."""
    return probe.kind if isinstance(probe, ProbeName) else probe.partition(" ")[0]


def series_number(probe: str) -> int:
    """Number of a probe among the probes of its kind: 2 for `ridge 2`, 1 for `ridge`."""
    if isinstance(probe, ProbeName):
        return probe.number
    number = probe.partition(" ")[2]
    return int(number) if number.isdecimal() else 1


def color(probe: str) -> str:
    """The colour of a probe: fixed for the first of a kind, darker or lighter for further ones."""
    kind_color = COLORS.get(base_kind(probe), OTHER_COLOR)
    if (number := series_number(probe)) == 1:
        return kind_color
    end, share = SHADES[(number - 2) % len(SHADES)]
    parts = (int(kind_color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (end - part) * share):02X}" for part in parts)


def stroke(probe: str, default: Any = ("-", "solid")) -> tuple[Any, str]:
    """The line style of a probe for matplotlib and plotly: broken for a control.

    `default` is the style of the first probe of a kind; `ridge 2` and `ridge 3` have other styles.
    """
    control = _kind_and_control(probe).partition("/")[2]
    number = series_number(probe)
    kind_style = MORE_STROKES[(number - 2) % len(MORE_STROKES)] if number > 1 else default
    return STROKES.get(control, kind_style)


def marker(probe: str) -> tuple[str, str]:
    """The marker of a probe for matplotlib and plotly; `ridge 2` has another one than `ridge`."""
    if (number := series_number(probe)) > 1:
        return MORE_MARKERS[(number - 2) % len(MORE_MARKERS)]
    return MARKERS.get(base_kind(probe), ("P", "cross"))


def telling_confidence(evaluation: Evaluation) -> list[tuple[str, int]]:
    """Probes and offsets at which precision@1 depends on the model's confidence."""
    return [
        (probe, offset)
        for probe in evaluation.probes
        for offset in evaluation.offsets
        if buckets_differ(
            [row for row in evaluation.select_buckets(probe, offset) if row.layer is not None]
        )
    ]


def letter_color(value: float, scale: Sequence[tuple[float, str]] = SCALE) -> str:
    """Black or white, whichever is easier to read on the colour of `value`, 0 to 1, in `scale`.

    The better of both has a contrast of 4.58 at least on any colour (WCAG 2.2, 1.4.3 asks 4.5).
    """
    value = min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    (low, low_color), (high, high_color) = next(
        (start, end) for start, end in itertools.pairwise(scale) if value <= end[0]
    )
    share = (value - low) / (high - low)
    # Relative luminance of the colour between both stops.
    luminance = 0.0
    for at, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        start, end = (int(name[at : at + 2], 16) / 255 for name in (low_color, high_color))
        part = start + (end - start) * share
        linear = part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        luminance += weight * linear
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"


def short_model_name(model: str) -> str:
    """A model's name for a title: the last folder of a path, a hub id unchanged."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def measure_title(measure: str) -> str:
    """A measure's name for a title: `KL to the model`, `precision@5`."""
    return "KL to the model" if measure == "kl" else measure.replace("_at_", "@")


def format_offset(offset: int) -> str:
    """An offset as text: `next token` for N = 0, `3 tokens ahead` for N = 2."""
    return "next token" if offset == 0 else f"{offset + 1} tokens ahead"


def panel_title(evaluation: Evaluation, offset: int) -> str:
    """The title of a panel: `N = 1 (2 tokens ahead), n = 4,000`."""
    n = max((row.n for row in evaluation.rows if row.offset == offset), default=0)
    return f"N = {offset} ({format_offset(offset)}), n = {n:,}"


def heatmap_title(heatmap: Heatmap) -> str:
    """The title of a heatmap: lens, offset, passage and number of tokens."""
    lens = f"{label(heatmap.probe)}, likeliest token at N = {heatmap.offset}"
    passage = f"sequence {heatmap.sequence} of the {heatmap.split} split"
    tokens = f"n = {len(heatmap.tokens)} tokens"
    return f"{lens} ({format_offset(heatmap.offset)}); {passage}, {tokens}"


def passage_name(heatmap: Heatmap) -> str:
    """Sequence, first token and first words of the passage of a heatmap."""
    words = "".join(heatmap.tokens).replace("␣", " ").replace("\\n", " ").split()
    return f"sequence {heatmap.sequence}, token {heatmap.start}: {' '.join(words)[:60]}…"


def shorten(token: str, letters: int = CELL_LETTERS) -> str:
    """`token`, cut to so many `letters`, the last one an ellipsis."""
    return token if len(token) <= letters else token[: letters - 1] + "…"


def log_floor(rows: Sequence[EvaluationRow]) -> float:
    """Lower end, in nats, of a logarithmic axis for the KL of `rows`; 0.0 where it is linear.

    A panel is logarithmic if its KL spans more than 1.5 decades. Rows below `KL_FLOOR` are the
    model itself (the last layer at N = 0) and do not stretch the axis.
    """
    values = [row.kl for row in rows if row.kl is not None and KL_FLOOR <= row.kl < math.inf]
    if not values or max(values) / min(values) <= 10**1.5:
        return 0.0
    return max(KL_FLOOR, 0.7 * min(values))


def plotted_value(row: EvaluationRow, measure: str, floor: float = 0.0) -> float:
    """Value of a measure in a picture, at least `floor`.

    NaN, which leaves a gap, for an undefined or infinite measure.
    """
    value: float | None = getattr(row, measure)
    return math.nan if value is None or not math.isfinite(value) else max(value, floor)


def interval_of(row: EvaluationRow, measure: str) -> tuple[float, float] | None:
    """The 95 % interval of a measure; None for a measure without an interval."""
    low, high = getattr(row, f"{measure}_low", None), getattr(row, f"{measure}_high", None)
    return None if low is None or high is None else (low, high)


def printable(text: str) -> str:
    """`text` with a box for every letter that matplotlib's default font cannot draw."""
    code_points = _font_code_points()
    return "".join(letter if ord(letter) in code_points else "▯" for letter in text)


@cache
def _font_code_points() -> frozenset[int]:
    """Code points of matplotlib's default font."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
