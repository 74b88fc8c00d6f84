"""Names, colours, markers and line styles of probes and measures in pictures and tables.

static_figures.py (matplotlib) and interactive_figures.py (plotly) take their style from here, so
that a probe looks the same in both. A probe's name is `kind[/control][ number]`: `ridge`,
`ridge 2`, `ridge/shuffled`; or what the user gave, a `ProbeName`, which knows its kind.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

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
    "vocab": "vocabulary probe",
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
    "vocab": "#E69F00",
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
MARKERS = {
    "logit": ("o", "circle"),
    "ridge": ("s", "square"),
    "lens": ("^", "triangle-up"),
    "future": ("D", "diamond"),
    "vocab": ("v", "triangle-down"),
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
"""Smaller KL, in nats, is drawn at this value on a logarithmic axis."""
SCALE = ((0.0, "#ffffff"), (0.35, "#c6e5f5"), (0.7, "#4aa3d0"), (1.0, "#08457e"))
"""Colour of a cell by probability; lightness falls evenly, so that grey prints are readable."""
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
    """The colour of a probe, fixed for each kind."""
    return COLORS.get(base_kind(probe), OTHER_COLOR)


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


def shorten(token: str, letters: int = CELL_LETTERS) -> str:
    """`token`, cut to so many `letters`, the last one an ellipsis."""
    return token if len(token) <= letters else token[: letters - 1] + "…"


def needs_log(rows: Sequence[EvaluationRow]) -> bool:
    """Whether the KL of `rows` spans more than 1.5 decades above the floor."""
    values = [max(row.kl, KL_FLOOR) for row in rows if row.kl is not None and row.kl < math.inf]
    return bool(values) and max(values) / min(values) > 10**1.5


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
