"""Rows of the tables of the study of essential layers."""

from dataclasses import dataclass

from ....probes.base.resampling import Interval

SUBSETS = ("final", "everywhere")
"""Answers whose last layer is correct; those of questions that are correct at every position."""
MEASURES = ("first", "final", "gap", "flips", "stay")


@dataclass(frozen=True)
class DepthRow:
    """Depths of one lens at one number of documents and position of the answer's."""

    lens: str
    subset: str
    """`final`: the model's last layer is correct; `everywhere`: at all positions of the question.
    """
    documents: float
    """K, the number of documents (or of pairs) in the context."""
    gold: float
    """g, the position of the document with the answer, from 0."""
    n: int
    """Answers in this cell."""
    accuracy: float
    """Share of them that the model's last layer has on top."""
    accuracy_interval: Interval
    kept: int
    """Answers of the subset, of which the other fields are."""
    first: float | None
    """Mean first-correct layer F; None without kept answers."""
    first_interval: Interval
    final: float | None
    """Mean final layer S."""
    final_interval: Interval
    gap: float | None
    """Mean of S - F."""
    gap_interval: Interval
    gap_median: float | None
    flips: float | None
    """Mean number of changes between neighbouring layers."""
    stay: float | None
    """Mean share of the layers from F on that are correct."""
    halfway: float | None
    """Mean first layer with more than half of the probability on the answer, where there is one."""
    halfway_share: float | None
    """Share of answers for which there is one."""


@dataclass(frozen=True)
class LayerRow:
    """What one lens reads of the answers at one layer, for one K and g, all answers counted."""

    lens: str
    documents: float
    gold: float
    layer: int
    n: int
    accuracy: float
    log_probability: float | None
    """Mean log p of the answer, in nats."""
    rank_median: float
    first_share: float
    """Share of answers whose first-correct layer this is."""
    final_share: float
    """Share of answers whose final layer this is."""


@dataclass(frozen=True)
class CurveRow:
    """The quadratic term of the gap over x = g / (K - 1), for one lens, subset and K.

    An inverted U has a negative one. Of questions that stand at several positions, differences
    within the question count (fixed effects).
    """

    lens: str
    subset: str
    documents: float
    quadratic: float | None
    """None with fewer than three positions, or without kept answers at three of them."""
    interval: Interval
    n: int
    paired: bool
