"""Names, colours and marks of probes and measures in pictures and tables."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from ..evaluation.heatmap import Heatmap
from ..evaluation.metrics import KS, EvaluationRow
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
# Okabe and Ito (2008): told apart with every common colour blindness.
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
OTHER_COLOR = "#56B4E9"
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
"""Measures that are drawn by layer, with the name of their axis."""
KL_FLOOR = 1e-3
"""Smaller KL, in nats, is drawn at this value on a logarithmic axis."""
SCALE = ((0.0, "#ffffff"), (0.35, "#c6e5f5"), (0.7, "#4aa3d0"), (1.0, "#08457e"))
"""Colour of a cell by probability; lightness falls evenly, so that it also prints grey."""
CELL_LETTERS = 8
"""Letters of a token shown in a cell."""


def label(probe: str) -> str:
    """`ridge 2` is drawn as `ridge lens 2`, `ridge/shuffled` as `ridge lens, shuffled states`."""
    kind, _, number = probe.partition(" ")
    names = ", ".join(LABELS.get(part, part) for part in kind.split("/"))
    return f"{names} {number}".strip()


def color(probe: str) -> str:
    """The fixed colour of a kind of probe."""
    return COLORS.get(base(probe), OTHER_COLOR)


def base(probe: str) -> str:
    """The kind of probe, without its number and its control."""
    return probe.partition(" ")[0].partition("/")[0]


def stroke(probe: str, first: Any = ("-", "solid")) -> tuple[Any, str]:
    """The line of a probe for matplotlib and plotly: broken for a control.

    `first` is that of the first probe of a kind; `ridge 2` and `ridge 3` have others.
    """
    control = probe.partition(" ")[0].partition("/")[2]
    more = MORE_STROKES[(series(probe) - 2) % len(MORE_STROKES)] if series(probe) > 1 else first
    return STROKES.get(control, more)


def marker(probe: str) -> tuple[str, str]:
    """The marker of a probe for matplotlib and plotly; that of `ridge 2` is not that of `ridge`."""
    if (number := series(probe)) > 1:
        return MORE_MARKERS[(number - 2) % len(MORE_MARKERS)]
    return MARKERS.get(base(probe), ("P", "cross"))


def short_name(model: str) -> str:
    """A model's name for a title: the folder of a path, a hub id as it is."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def caption(evaluation: Evaluation, offset: int) -> str:
    """`N = 1 (two tokens ahead), n = 4000` for the title of a panel."""
    n = max((row.n for row in evaluation.rows if row.offset == offset), default=0)
    return f"N = {offset} ({ahead(offset)}), n = {n:,}"


def ahead(offset: int) -> str:
    return "next token" if offset == 0 else f"{offset + 1} tokens ahead"


def short(token: str, letters: int = CELL_LETTERS) -> str:
    return token if len(token) <= letters else token[: letters - 1] + "…"


def needs_log(rows: Sequence[EvaluationRow]) -> bool:
    """True if the KL of `rows` spans more than 1.5 decades above the floor."""
    values = [max(row.kl, KL_FLOOR) for row in rows if row.kl is not None and row.kl < math.inf]
    return bool(values) and max(values) / min(values) > 10**1.5


def band_of(row: EvaluationRow, measure: str) -> tuple[float, float] | None:
    """The 95 % interval of a measure, where it has one."""
    low, high = getattr(row, f"{measure}_low", None), getattr(row, f"{measure}_high", None)
    return None if low is None or high is None else (low, high)


def measure_title(measure: str) -> str:
    return "KL to the model" if measure == "kl" else measure.replace("_at_", "@")


def heatmap_title(heatmap: Heatmap) -> str:
    what = f"{label(heatmap.probe)}, likeliest token at N = {heatmap.offset}"
    where = f"sequence {heatmap.sequence} of the {heatmap.split} split"
    return f"{what} ({ahead(heatmap.offset)}); {where}, n = {len(heatmap.tokens)} tokens"


def printable(text: str) -> str:
    """`text` with a box for every letter that matplotlib's own font cannot draw."""
    known = _letters()
    return "".join(letter if ord(letter) in known else "▯" for letter in text)


@cache
def _letters() -> frozenset[int]:
    """Code points of matplotlib's default font."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def series(probe: str) -> int:
    """Number of a probe among those of its kind: 2 for `ridge 2`, 1 for `ridge`."""
    number = probe.partition(" ")[2]
    return int(number) if number.isdecimal() else 1


def drawn(row: EvaluationRow, measure: str, floor: float = 0.0) -> float:
    """Value of a measure in a picture; NaN, which leaves a gap, if undefined or infinite."""
    value: float | None = getattr(row, measure)
    return math.nan if value is None or not math.isfinite(value) else max(value, floor)
