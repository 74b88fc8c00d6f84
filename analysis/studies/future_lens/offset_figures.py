"""Figures of the study: measures by layer, confidence, calibration, kept shares and names."""

from collections.abc import Callable, Sequence
from typing import Any

from ....probes.base.readout import Readout
from ...report.probe_style import format_offset, label
from ..results.study_figures import Panel, Series, StudyFigure
from .confidence_rows import PUBLISHED_NAME, BucketPrecision, CurvePoint
from .layer_rows import OffsetRow, is_baseline, is_control
from .name_rows import NameRow
from .pair_filters import KeptRow

MEASURES = {
    "precision_at_1": "precision@1 (model's token)",
    "precision_at_1_text": "precision@1 (text's token)",
    "precision_at_5": "precision@5 (model's token)",
    "kl": "KL(model ‖ probe), nats",
    "nll": "-log q(model's token), nats",
    "surprisal": "surprisal of the probe's token, nats",
}
FIRST = ("precision_at_1",)
FURTHER = ("precision_at_1_text", "precision_at_5", "nll", "surprisal")
MOST_PANELS = 4
"""Most offsets that are drawn beside each other."""


def shown_name(name: str) -> str:
    """A probe's name in legends."""
    return name if name == PUBLISHED_NAME else label(name)


def layer_figures(
    rows: Sequence[OffsetRow], readouts: dict[str, Readout], offsets: Sequence[int], keep: str
) -> list[StudyFigure]:
    """Measures against the layer, a panel for each offset; baselines of tokens are level lines."""
    shown = list(offsets)[:MOST_PANELS]
    counted = {"none": "all pairs", "correct": "pairs whose model token is the text's"}
    pairs = counted.get(keep, "pairs whose model tokens are the text's up to t+N")
    return [
        StudyFigure(
            name="precision-by-layer",
            caption=f"How often a probe of the state at t has the model's token after t+N on top, "
            f"over {pairs}. Bands: 95 % intervals over documents. Dashed and dotted: baselines and "
            "controls, without bands, since differences are in a table; the bigram reads the true "
            "token at t+N, which the probes do not.",
            rows=[[_layer_panel(rows, readouts, offset, FIRST[0]) for offset in shown]],
        ),
        StudyFigure(
            name="measures-by-layer",
            caption=f"Further measures of the same pairs ({pairs}): precision against the text, "
            "precision@5, the probe's surprise at the model's token and the model's at the "
            "probe's.",
            rows=[
                [_layer_panel(rows, readouts, offset, measure) for offset in shown]
                for measure in FURTHER
            ],
        ),
    ]


def _layer_panel(
    rows: Sequence[OffsetRow], readouts: dict[str, Readout], offset: int, measure: str
) -> Panel:
    here = [row for row in rows if row.offset == offset]
    layers = sorted(
        {
            row.layer
            for row in here
            if row.layer is not None and not is_baseline(readouts[row.probe])
        }
    )
    series = []
    for name, readout in readouts.items():
        of_probe = sorted(
            (row for row in here if row.probe == name), key=lambda row: row.layer or 0
        )
        if not of_probe:
            continue
        is_level = is_baseline(readout)
        chosen = [of_probe[0]] * len(layers) if is_level else of_probe
        dash = "dash" if is_level else "dot" if is_control(readout) else "solid"
        if not layers:
            continue
        series.append(
            _series(
                shown_name(name),
                layers if is_level else [row.layer for row in chosen],
                chosen,
                measure,
                dash,
                band=dash == "solid",
            )
        )
    n = max((row.n for row in here), default=0)
    return Panel(
        title=f"N = {offset} ({format_offset(offset)}), n = {n:,}",
        x_label="layer",
        y_label=MEASURES[measure],
        series=series,
        y_range=(0.0, None),
    )


def _series(
    name: str, x: Sequence[Any], rows: Sequence[Any], field: str, dash: str, band: bool = True
) -> Series:
    intervals = [getattr(row, f"{field}_interval") for row in rows]
    return Series(
        label=name,
        x=list(x),
        y=[getattr(row, field) for row in rows],
        low=[interval[0] for interval in intervals] if band else None,
        high=[interval[1] for interval in intervals] if band else None,
        dash=dash,
    )


def bucket_figure(rows: Sequence[BucketPrecision], offsets: Sequence[int]) -> StudyFigure:
    """Precision@1 by the model's confidence, with the published row beside."""
    panels = []
    for offset in list(offsets)[:MOST_PANELS]:
        here = [row for row in rows if row.offset == offset]
        names = list(dict.fromkeys(row.probe for row in here))
        buckets = list(dict.fromkeys(row.bucket for row in sorted(here, key=_bucket_start)))
        series = []
        for name in names:
            by_bucket = {row.bucket: row for row in here if row.probe == name}
            found = [by_bucket[bucket] for bucket in buckets if bucket in by_bucket]
            dash = "dot" if name == PUBLISHED_NAME else "solid"
            x = [row.bucket for row in found]
            series.append(_series(shown_name(name), x, found, "precision_at_1", dash))
        panels.append(
            Panel(
                title=f"N = {offset}",
                x_label="the model's largest probability at t+N",
                y_label="precision@1",
                series=series,
                y_range=(0.0, 1.0),
            )
        )
    return StudyFigure(
        name="confidence",
        caption="Precision@1 of each probe at its best layer by the model's own confidence. The "
        "dotted line at N = 1 is published, of another method and model: a learned prompt on GPT-J "
        "that reads the true next token.",
        rows=[panels],
    )


def _bucket_start(row: BucketPrecision) -> float:
    return float(row.bucket.partition("-")[0])


def calibration_figure(points: Sequence[CurvePoint], offsets: Sequence[int]) -> StudyFigure:
    """Hits against the probe's own confidence; a calibrated probe lies on the diagonal."""
    panels = []
    for offset in list(offsets)[:MOST_PANELS]:
        here = [point for point in points if point.offset == offset]
        series = [Series("calibrated", [0.0, 1.0], [0.0, 1.0], dash="dash")]
        for name in dict.fromkeys(point.probe for point in here):
            found = [point for point in here if point.probe == name]
            x = [point.confidence for point in found]
            text = f"{shown_name(name)}, text's token"
            series.append(_series(text, x, found, "precision_at_1_text", "solid"))
            of_model = f"{shown_name(name)}, model's token"
            series.append(_series(of_model, x, found, "precision_at_1", "dot"))
        panels.append(
            Panel(
                title=f"N = {offset}",
                x_label="the probe's largest probability",
                y_label="share of hits",
                series=series,
                y_range=(0.0, 1.0),
            )
        )
    return StudyFigure(
        name="calibration",
        caption="Share of pairs for which the probe's top token is the text's (solid) and the "
        "model's (dotted), by the probe's own largest probability, at its best layer. A probe that "
        "is the model itself is right about the model's token at any probability.",
        rows=[panels],
    )


def kept_figure(rows: Sequence[KeptRow]) -> StudyFigure:
    """The share of pairs that each filter keeps, by offset."""
    series = []
    for keep in dict.fromkeys(row.keep for row in rows):
        found = [row for row in rows if row.keep == keep]
        series.append(_series(keep, [row.offset for row in found], found, "share", "solid"))
    return StudyFigure(
        name="kept-pairs",
        caption="Share of the pairs (t, t+N) that each filter keeps: `correct` those whose model "
        "token after t+N is the text's, `agree` those for which this holds from t to t+N.",
        rows=[[Panel("Kept pairs", "offset N", "share of pairs", series, (0.0, 1.0))]],
    )


def names_figure(rows: Sequence[NameRow]) -> StudyFigure:
    """Precision@1 inside names beside all pairs, by offset."""
    panels = []
    for probe in dict.fromkeys(row.probe for row in rows):
        here = [row for row in rows if row.probe == probe]
        offsets = [f"N = {row.offset}" for row in here]
        read: list[tuple[str, Callable[[NameRow], Any], str]] = [
            ("inside names", lambda row: row.precision_at_1, "precision_at_1_interval"),
            ("all pairs", lambda row: row.precision_at_1_all, "precision_at_1_all_interval"),
        ]
        series = [
            Series(
                label=name,
                x=offsets,
                y=[value(row) for row in here],
                low=[getattr(row, interval)[0] for row in here],
                high=[getattr(row, interval)[1] for row in here],
                kind="bars",
            )
            for name, value, interval in read
        ]
        panels.append(Panel(shown_name(probe), "", "precision@1", series, (0.0, 1.0)))
    return StudyFigure(
        name="names",
        caption="Precision@1 at the probe's best layer where the tokens ahead lie inside one name "
        "of several tokens, beside all pairs.",
        rows=[panels[:3]],
    )
