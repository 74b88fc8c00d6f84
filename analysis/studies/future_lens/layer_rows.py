"""Rows of the study by layer: all measures, the layer where an offset peaks, differences there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval
from ....probes.baselines.token_counts import CountBaseline
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.confidence_buckets import ResultKey
from .pair_measures import PairMeasures

P1 = "precision_at_1"


@dataclass(frozen=True)
class OffsetRow:
    """Measures of one probe at one layer and offset N, against the model's token and the text's."""

    probe: str
    layer: int | None
    """Layer that the probe reads; None for a baseline of tokens."""
    offset: int
    """N: from the state at t to the model's token after t+N, where N = 0 is the next token."""
    n: int
    """Pairs (t, t+N) that the filter keeps."""
    n_undefined: int
    """Pairs without a distribution of the model or the probe; their measures are None."""
    precision_at_1: float | None
    """Share of pairs for which the probe's top token is the model's."""
    precision_at_1_interval: Interval
    precision_at_5: float | None
    precision_at_5_interval: Interval
    precision_at_10: float | None
    precision_at_10_interval: Interval
    kl: float | None
    """KL(model || probe) in nats."""
    kl_interval: Interval
    nll: float | None
    """-log q of the model's top token, q the probe's distribution, in nats."""
    nll_interval: Interval
    surprisal: float | None
    """-log p of the probe's top token, p the model's distribution (the paper's surprisal)."""
    surprisal_interval: Interval
    n_text: int
    """Pairs after which the text goes on."""
    precision_at_1_text: float | None
    """Share of these for which the probe's top token is the text's."""
    precision_at_1_text_interval: Interval
    precision_at_5_text: float | None
    precision_at_5_text_interval: Interval
    precision_at_10_text: float | None
    precision_at_10_text_interval: Interval
    nll_text: float | None
    """-log q of the text's token, in nats."""
    nll_text_interval: Interval


@dataclass(frozen=True)
class PeakRow:
    """The layer at which a probe reads one offset best, and from where it beats baselines."""

    probe: str
    offset: int
    n: int
    peak: int
    """The layer of largest precision@1, the lowest one on ties."""
    peak_interval: Interval
    """2.5 and 97.5 % percentiles of the peak over resamples of the documents."""
    precision_at_1: float
    """At the peak; the largest of several noisy numbers, so slightly too high."""
    precision_at_1_interval: Interval
    beats_bigram_from: int | None
    """First layer whose precision@1 is above the bigram's, interval and all; the bigram reads the
    true token at t+N, the probe does not. None for no such layer."""
    beats_marginal_from: int | None
    """The same for the marginalised bigram, which reads the model's distribution at t alone."""


@dataclass(frozen=True)
class DifferenceRow:
    """Precision@1 of a probe at its peak less that of another readout of the same pairs."""

    probe: str
    offset: int
    layer: int
    """The peak of the probe."""
    other: str
    """A baseline, a control or another probe."""
    other_layer: int | None
    """The same layer where the other one reads it, else its own peak."""
    difference: float
    difference_interval: Interval


def offset_rows(measures: PairMeasures) -> list[OffsetRow]:
    """A row for every result with a pair."""
    names = [field.removesuffix("_interval") for field in OffsetRow.__annotations__]
    names = [
        name for name in dict.fromkeys(names) if f"{name}_interval" in OffsetRow.__annotations__
    ]
    rows = []
    for key in measures.sums:
        if not measures.count(key):
            continue
        rows.append(
            OffsetRow(
                probe=key.probe,
                layer=key.layer,
                offset=key.offset,
                n=measures.count(key),
                n_undefined=measures.count(key, "n_undefined"),
                n_text=measures.count(key, "n_text"),
                **{name: measures.mean(key, name) for name in names},  # pyright: ignore[reportArgumentType]
                **{f"{name}_interval": measures.interval(key, name) for name in names},  # pyright: ignore[reportArgumentType]
            )
        )
    return rows


def layered_keys(measures: PairMeasures, probe: str, offset: int) -> list[ResultKey]:
    """Results of `probe` at `offset` that read a layer and have a defined precision, by layer."""
    keys = [
        key
        for key in measures.sums
        if key.probe == probe and key.offset == offset and key.layer is not None
    ]
    keys = [key for key in keys if measures.mean(key, P1) is not None]
    return sorted(keys, key=lambda key: key.layer or 0)


def peak_key(measures: PairMeasures, probe: str, offset: int) -> ResultKey | None:
    """The result of largest precision@1 among the layers; None without one."""
    keys = layered_keys(measures, probe, offset)
    if not keys:
        return None
    values = [measures.mean(key, P1) or 0.0 for key in keys]
    return keys[int(np.argmax(values))]


def is_baseline(readout: Readout) -> bool:
    """Whether a readout counts tokens, instead of reading a layer of its own."""
    return isinstance(readout, CountBaseline)


def is_control(readout: Readout) -> bool:
    """Whether a readout is a control, fitted on a changed cache."""
    return hasattr(readout, "view")


def peak_rows(
    measures: PairMeasures, readouts: dict[str, Readout], offsets: Sequence[int]
) -> list[PeakRow]:
    """The peak of each probe at each offset; not of baselines and controls."""
    kinds = {readout.kind: name for name, readout in reversed(readouts.items())}
    rows = []
    for name, readout in readouts.items():
        if is_baseline(readout) or is_control(readout):
            continue
        for offset in offsets:
            keys = layered_keys(measures, name, offset)
            if not keys or all(not measures.count(key) for key in keys):
                continue
            best = peak_key(measures, name, offset)
            assert best is not None
            assert best.layer is not None
            rows.append(
                PeakRow(
                    probe=name,
                    offset=offset,
                    n=measures.count(best),
                    peak=best.layer,
                    peak_interval=_peak_interval(measures, keys),
                    precision_at_1=measures.mean(best, P1) or 0.0,
                    precision_at_1_interval=measures.interval(best, P1),
                    beats_bigram_from=_first_above(measures, keys, kinds.get("bigram")),
                    beats_marginal_from=_first_above(measures, keys, kinds.get("marginal")),
                )
            )
    return rows


def _peak_interval(measures: PairMeasures, keys: Sequence[ResultKey]) -> Interval:
    """Percentiles of the layer with the largest mean over resamples; None with one document."""
    if None in measures.interval(keys[0], P1):
        return None, None
    means = np.stack([measures.resampled_means(key, P1) for key in keys], 1)
    means = means[np.isfinite(means).all(1)]
    layers = np.array([key.layer for key in keys])[means.argmax(1)]
    low, high = np.percentile(layers, (2.5, 97.5), method="inverted_cdf")
    return float(low), float(high)


def _first_above(
    measures: PairMeasures, keys: Sequence[ResultKey], baseline: str | None
) -> int | None:
    """First layer whose precision@1 less the baseline's has an interval above 0."""
    for key in keys:
        other = _key_of(measures, baseline, key.offset, key.layer) if baseline else None
        if other is None:
            return None
        low, _ = measures.difference(key, other, P1)[1]
        if low is not None and low > 0:
            return key.layer
    return None


def _key_of(measures: PairMeasures, probe: str, offset: int, layer: int | None) -> ResultKey | None:
    """The result of `probe` at `layer`, else without a layer, else at its peak."""
    for key in (ResultKey(probe, layer, offset), ResultKey(probe, None, offset)):
        if key in measures.sums:
            return key
    return peak_key(measures, probe, offset)


def difference_rows(
    measures: PairMeasures, readouts: dict[str, Readout], offsets: Sequence[int]
) -> list[DifferenceRow]:
    """Each given probe at its peak against every other readout; the logit lens is only an other."""
    rows = []
    for name, readout in readouts.items():
        if is_baseline(readout) or is_control(readout) or type(readout) is LogitLens:
            continue
        for offset in offsets:
            best = peak_key(measures, name, offset)
            if best is None or best.layer is None:
                continue
            for other in readouts:
                other_key = _key_of(measures, other, offset, best.layer)
                if other == name or other_key is None:
                    continue
                if measures.mean(other_key, P1) is None:
                    continue
                difference, interval = measures.difference(best, other_key, P1)
                rows.append(
                    DifferenceRow(
                        probe=name,
                        offset=offset,
                        layer=best.layer,
                        other=other,
                        other_layer=other_key.layer,
                        difference=difference,
                        difference_interval=interval,
                    )
                )
    return rows
