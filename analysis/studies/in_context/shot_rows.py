"""Precision at every number of shots beside a bigram: `ShotRow`, `FirstShotRow`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval, bootstrap_interval, resampling_counts
from .shot_readings import ShotSample

INSIDE, BEYOND = "inside", "beyond"
"""Targets in the part of the answer that enough shots determine, and after it."""
Hits = Mapping[tuple[str, int | None, int], np.ndarray]


@dataclass(frozen=True)
class ShotRow:
    """What one readout foresees at one layer and offset, after one number of shots."""

    kind: str
    """Kind of text."""
    lens: str
    layer: int | None
    offset: int
    """N: the token after t+N is predicted from the state at t."""
    part: str
    """`inside`: the token belongs to the part of the answer that shots determine; `beyond`: it
    stands after that part, drawn at random."""
    shots: int
    predictable: bool
    """Whether the token follows from the context: inside, after enough shots."""
    n: int
    """Pairs (t, t+N)."""
    documents: int
    precision: float
    """Precision@1: share of the pairs whose token of the text is on top."""
    precision_interval: Interval
    bigram: float
    """Precision@1 of the bigram, marginalised over the tokens between, for the same pairs."""
    bigram_interval: Interval
    gain: float
    """Precision less that of the bigram, paired."""
    gain_interval: Interval


@dataclass(frozen=True)
class FirstShotRow:
    """From how many shots on a readout is above the bigram, inside the determined part."""

    kind: str
    lens: str
    layer: int | None
    offset: int
    first_shots: int | None
    """Fewest shots from which on, at all counted numbers, the interval of the gain is above 0."""
    most_shots: int
    """Largest number of shots that was counted."""
    gain: float
    """Gain at the largest number of shots."""
    gain_interval: Interval
    n: int
    """Pairs at the largest number of shots."""


@dataclass(frozen=True, eq=False)
class ShotLabels:
    """Kind, shots and needed shots of the sequences of a sample, `(sequences,)`."""

    kind: np.ndarray
    shots: np.ndarray
    needed: np.ndarray


def shot_rows(
    sample: ShotSample, labels: ShotLabels, hits: Hits, bigram: Mapping[int, np.ndarray]
) -> list[ShotRow]:
    """Rows of all readouts; `bigram` has the hits of the bigram by offset."""
    weights = resampling_counts(sample.units.n_resampled, sample.seed)
    rows = []
    for offset, of_bigram in bigram.items():
        sources = sample.sources(offset)
        inside = sample.is_inside(offset, sources)
        sequence = sample.sequence_rows[sources]
        unit = sample.units.unit_numbers[sources]
        for kind, shots, part, mask in _cells(labels, sequence, inside):
            of_mask = unit[mask]
            base, base_interval = _mean(of_bigram[mask], of_mask, weights)
            needed = labels.needed[sequence[mask]].max()
            for (name, layer, at), found in hits.items():
                if at != offset:
                    continue
                precision, interval = _mean(found[mask], of_mask, weights)
                difference = found[mask].astype(np.float64) - of_bigram[mask]
                gain, gain_interval = _mean(difference, of_mask, weights)
                rows.append(
                    ShotRow(
                        kind=kind,
                        lens=name,
                        layer=layer,
                        offset=offset,
                        part=part,
                        shots=shots,
                        predictable=bool(part == INSIDE and shots >= needed),
                        n=int(mask.sum()),
                        documents=len(np.unique(of_mask)),
                        precision=precision,
                        precision_interval=interval,
                        bigram=base,
                        bigram_interval=base_interval,
                        gain=gain,
                        gain_interval=gain_interval,
                    )
                )
    order = {name: number for number, name in enumerate(dict.fromkeys(key[0] for key in hits))}
    return sorted(
        rows,
        key=lambda row: (
            row.kind, order[row.lens], row.offset, -1 if row.layer is None else row.layer,
            row.part == BEYOND, row.shots,
        ),
    )  # fmt: skip


def _cells(
    labels: ShotLabels, sequence: np.ndarray, inside: np.ndarray
) -> list[tuple[str, int, str, np.ndarray]]:
    """Kind, shots, part and the mask of their pairs, for those that have pairs."""
    kind, shots = labels.kind[sequence], labels.shots[sequence]
    cells = []
    for name in np.unique(kind).tolist():
        for count in np.unique(shots[kind == name]).tolist():
            of_shots = (kind == name) & (shots == count)
            for part, mask in ((INSIDE, of_shots & inside), (BEYOND, of_shots & ~inside)):
                if mask.any():
                    cells.append((str(name), int(count), part, mask))
    return cells


def _mean(values: np.ndarray, units: np.ndarray, weights: np.ndarray) -> tuple[float, Interval]:
    """Mean of `values` `(n,)` and its interval over `units` `(n,)`."""
    names, numbers = np.unique(units, return_inverse=True)
    n = np.bincount(numbers).astype(np.float64)
    sums = np.bincount(numbers, values.astype(np.float64))
    return float(sums.sum() / n.sum()), bootstrap_interval(n, sums, weights[:, names])


def first_shot_rows(rows: Sequence[ShotRow]) -> list[FirstShotRow]:
    """From how many shots on each readout is above the bigram, at every layer and offset."""
    series: dict[tuple[str, str, int | None, int], list[ShotRow]] = {}
    for row in rows:
        if row.part == INSIDE:
            series.setdefault((row.kind, row.lens, row.layer, row.offset), []).append(row)
    found = []
    for (kind, lens, layer, offset), of_series in series.items():
        ordered = sorted(of_series, key=lambda row: row.shots)
        first = None
        for row in reversed(ordered):
            low = row.gain_interval[0]
            if low is None or low <= 0:
                break
            first = row.shots
        last = ordered[-1]
        found.append(
            FirstShotRow(
                kind=kind,
                lens=lens,
                layer=layer,
                offset=offset,
                first_shots=first,
                most_shots=last.shots,
                gain=last.gain,
                gain_interval=last.gain_interval,
                n=last.n,
            )
        )
    return found
