"""Rows of the study inside names of several tokens, beside all pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....probes.base.resampling import Interval
from ...evaluation.confidence_buckets import ResultKey
from ...evaluation.metrics import COLUMNS
from .layer_rows import P1
from .pair_measures import PairMeasures, mean_difference

PUBLISHED_NAMES: Mapping[int, float] = {1: 0.44, 2: 0.42, 3: 0.37}
"""Precision@1 inside named entities of several tokens by offset, of a learned prompt on GPT-J (Pal
et al., 2311.04897); the entities and their number are not published."""


@dataclass(frozen=True)
class NameRow:
    """Precision@1 of one probe at its best layer inside names, beside all pairs."""

    probe: str
    offset: int
    layer: int
    """The layer of largest precision@1 over all pairs."""
    n: int
    """Pairs whose tokens ahead lie inside one name."""
    precision_at_1: float | None
    precision_at_1_interval: Interval
    n_all: int
    precision_at_1_all: float | None
    precision_at_1_all_interval: Interval
    difference: float | None
    """Inside names less all pairs."""
    difference_interval: Interval
    published: float | None
    """The number of the paper at this offset: another method, model and set of names."""


def name_rows(
    inside: PairMeasures, overall: PairMeasures, peaks: Sequence[ResultKey]
) -> list[NameRow]:
    """A row for each of `peaks` with a pair inside a name."""
    rows = []
    columns = [COLUMNS.index("n"), COLUMNS.index(P1)]
    for key in peaks:
        if key not in inside.sums or not inside.count(key):
            continue
        assert key.layer is not None
        one, other = (
            (found.sums[key][:, columns[0]], found.sums[key][:, columns[1]])
            for found in (inside, overall)
        )
        difference, interval = mean_difference(one, other, overall.weights)
        rows.append(
            NameRow(
                probe=key.probe,
                offset=key.offset,
                layer=key.layer,
                n=inside.count(key),
                precision_at_1=inside.mean(key, P1),
                precision_at_1_interval=inside.interval(key, P1),
                n_all=overall.count(key),
                precision_at_1_all=overall.mean(key, P1),
                precision_at_1_all_interval=overall.interval(key, P1),
                difference=difference,
                difference_interval=interval,
                published=PUBLISHED_NAMES.get(key.offset),
            )
        )
    return rows
