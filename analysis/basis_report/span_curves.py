"""Numbers and style of causal bases in pictures and tables: `SpanCurve`, names, colours, formats.

interactive_spectra.py (plotly), static_spectra.py (matplotlib) and basis_tables.py take them from
here. Rows are those of `CausalBasis.metrics()`; the influence of a layer in the model itself is a
mapping with the keys of `INFLUENCE_KEYS`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache import UsageError
from ..report.probe_style import KL_FLOOR, OTHER_COLOR

ROW_KEYS = (
    "layer",
    "k",
    "method",
    "metric",
    "n",
    "n_test",
    "energies",
    "influences",
    "span",
    "pca",
    "random",
    "evaluations",
    "cpu_seconds",
)
"""Keys that a row of metrics needs."""
INFLUENCE_KEYS = (
    "lens_influences",
    "model_influences",
    "lens_span",
    "model_span",
    "control_spans",
    "spearman",
    "alignment",
    "span_alignment",
)
"""Keys that the influence of a layer in the model needs."""
BASIS_LABELS = {"causal": "causal basis", "pca": "PCA", "random": "random directions"}
"""Names of bases for people."""
BASIS_COLORS = {"causal": "#0072B2", "pca": "#D55E00", "random": "#777777"}
"""Colours of bases, of the palette of Okabe and Ito (2008)."""
BASIS_MARKERS = {"causal": ("o", "circle"), "pca": ("s", "square"), "random": ("^", "triangle-up")}
"""Markers of bases for matplotlib and plotly."""
OTHER_MARKER = ("D", "diamond")
"""Marker of other bases."""

Estimate = Mapping[str, Any]
"""A mean over positions, `kl`, and its 95 % interval, `low` to `high`; None where undefined."""


@dataclass(frozen=True)
class SpanCurve:
    """KL of ablating the first k directions of one basis, by k, in the lens or in the model."""

    basis: str
    """`causal`, `pca`, `random`, or the name of another control."""
    in_model: bool
    """Whether the layer was ablated in the model; else in the lens."""
    estimates: dict[int, Estimate]
    """k -> KL in nats with its interval, ascending."""

    @property
    def label(self) -> str:
        """Name for a legend: `PCA, lens`."""
        place = "model" if self.in_model else "lens"
        return f"{BASIS_LABELS.get(self.basis, self.basis)}, {place}"

    @property
    def color(self) -> str:
        """Colour, the same in the lens and in the model."""
        return BASIS_COLORS.get(self.basis, OTHER_COLOR)

    @property
    def marker(self) -> tuple[str, str]:
        """Marker for matplotlib and plotly."""
        return BASIS_MARKERS.get(self.basis, OTHER_MARKER)

    @property
    def ks(self) -> list[int]:
        """Numbers of directions, ascending."""
        return list(self.estimates)

    def values(self, name: str, floor: float = 0.0) -> list[float]:
        """`kl`, `low` or `high` by k, at least `floor`; NaN, which leaves a gap, if undefined."""
        values = (finite_number(estimate[name]) for estimate in self.estimates.values())
        return [math.nan if value is None else max(value, floor) for value in values]

    @property
    def has_intervals(self) -> bool:
        """Whether every k has an interval."""
        ends = (finite_number(e[name]) for e in self.estimates.values() for name in ("low", "high"))
        return all(end is not None for end in ends)


def span_curves(
    row: Mapping[str, Any], influence: Mapping[str, Any] | None = None
) -> list[SpanCurve]:
    """The curves of a layer: causal basis, PCA and random in the lens, then those in the model."""
    spans = [("causal", False, row["span"]), ("pca", False, row["pca"])]
    spans.append(("random", False, row["random"]))
    if influence is not None:
        spans.append(("causal", True, influence["model_span"]))
        spans += [(name, True, span) for name, span in influence["control_spans"].items()]
    return [SpanCurve(name, in_model, estimates_by_k(span)) for name, in_model, span in spans]


def estimates_by_k(span: Mapping[Any, Estimate]) -> dict[int, Estimate]:
    """`span` by whole numbers k, ascending; JSON has keys of text."""
    return dict(sorted((int(k), estimate) for k, estimate in span.items()))


def axis_floor(curves: Sequence[SpanCurve]) -> float:
    """Floor of a logarithmic axis, `KL_FLOOR`, if the curves span over 1.5 decades; else 0."""
    values = [v for curve in curves for v in curve.values("kl", KL_FLOOR) if math.isfinite(v)]
    return KL_FLOOR if values and max(values) / min(values) > 10**1.5 else 0.0


def check_metrics(
    rows: Sequence[Mapping[str, Any]], model_influence: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raise `UsageError` unless rows and influences have their keys and one value per direction."""
    if not rows:
        raise UsageError("there is no row of metrics; fit a causal basis at one layer at least")
    for row in rows:
        _check_keys(row, ROW_KEYS, f"the metrics of layer {row.get('layer', '?')}")
        influence = model_influence.get(row["layer"])
        for name in ("span", "pca", "random"):
            if row["k"] not in estimates_by_k(row[name]):
                raise UsageError(
                    f"the metrics of layer {row['layer']} have no {name} for k = {row['k']}; "
                    f"expected are k = 1, 2, 4, .., {row['k']}"
                )
        lists = {name: row[name] for name in ("energies", "influences")}
        if influence is not None:
            name = f"the model influence of layer {row['layer']}"
            _check_keys(influence, INFLUENCE_KEYS, name)
            lists |= {name: influence[name] for name in ("lens_influences", "model_influences")}
        for name, values in lists.items():
            if len(values) != row["k"]:
                raise UsageError(
                    f"layer {row['layer']} has {row['k']} directions, but {len(values)} {name}; "
                    "take metrics and influences of the same fit"
                )


def _check_keys(value: Mapping[str, Any], keys: Sequence[str], name: str) -> None:
    """Raise `UsageError` if `value` lacks one of `keys`."""
    missing = [key for key in keys if key not in value]
    if missing:
        raise UsageError(f"{name} lack {', '.join(missing)}; expected are {', '.join(keys)}")


def finite_number(value: Any) -> float | None:
    """`value` as a number; None if it is undefined or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def format_number(value: Any) -> str:
    """A measure with three significant digits; `undefined` without a finite number."""
    number = finite_number(value)
    return "undefined" if number is None else f"{number:.3g}"


def format_estimate(value: Any, low: Any, high: Any) -> str:
    """A measure with its interval: `0.123 [0.1, 0.15]`; the measure alone without interval."""
    ends = finite_number(low), finite_number(high)
    interval = "" if None in ends else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
    return format_number(value) + interval
