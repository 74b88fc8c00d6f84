"""Rows of the tables of prompts, made of readings: means, intervals, differences to controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....probes.base.resampling import Interval
from ...studies.trajectories.position_sample import PositionSample
from .prompt_readings import PromptReading, ReadingKey


@dataclass(frozen=True)
class PromptRow:
    """What one prompt reads of one layer at one offset; surprisal, nll and kl in nats."""

    prompt: str
    layer: int
    target_layer: int
    """Layer at which the state is put in."""
    offset: int
    mode: str
    """`forced`: the tokens t+1 to t+N of the text are given; `free`: the prompt goes on alone."""
    n: int
    precision: float | None
    """Share of samples whose top token is the model's in the text at t+N (precision@1)."""
    precision_interval: Interval
    precision_5: float | None
    precision_10: float | None
    text_precision: float | None
    """Share of samples whose top token is the text's at t+N+1."""
    surprisal: float | None
    """Mean -log p(top token), p of the model in the text."""
    surprisal_interval: Interval
    nll: float | None
    """Mean -log q(the model's top token)."""
    kl: float | None
    """Mean KL(model || prompt)."""
    shuffled: float | None
    """Precision@1 with the states of other samples."""
    shuffled_interval: Interval
    gain: float | None
    """Precision@1 less that of shuffled states, by the same samples."""
    gain_interval: Interval
    shuffled_surprisal: float | None
    next_token: float | None
    """Precision@1 of the vocabulary probe of state and next token's embedding."""
    bigram: float | None
    """Precision@1 of the bigram of the token at t+N."""
    lead: float | None
    """Precision@1 less the better of `next_token` and `bigram`, by the same samples."""
    lead_interval: Interval


@dataclass(frozen=True)
class RivalRow:
    """What a probe says at the same samples, without the model; nats."""

    probe: str
    layer: int | None
    offset: int
    n: int
    precision: float | None
    precision_interval: Interval
    precision_5: float | None
    precision_10: float | None
    text_precision: float | None
    surprisal: float | None
    nll: float | None
    kl: float | None


def hits(reading: PromptReading, most: int = 1, measure: str = "rank") -> np.ndarray:
    """1 where the token is among the first `most`, 0 elsewhere, NaN where undefined, `(n,)`."""
    ranks = reading.values[measure]
    return np.where(np.isnan(ranks), np.nan, ranks <= most).astype(np.float64)


def prompt_row(
    name: str,
    keys: Sequence[ReadingKey],
    readings: Mapping[ReadingKey, PromptReading],
    places: PositionSample,
    rivals: "Rivals",
) -> PromptRow:
    """The row of the readings `keys`, beside their controls and rivals.

    Several readings, of several prompts, are averaged sample by sample.
    """
    first = keys[0]
    own_readings = [readings[key] for key in keys]
    shuffled_readings = [readings[replace(key, is_shuffled=True)] for key in keys]

    def mean_hits(of: Sequence[PromptReading], most: int = 1, measure: str = "rank") -> np.ndarray:
        return np.mean([hits(reading, most, measure) for reading in of], 0)

    def mean_of(of: Sequence[PromptReading], measure: str) -> np.ndarray:
        return np.mean([reading.values[measure] for reading in of], 0)

    own, control = mean_hits(own_readings), mean_hits(shuffled_readings)
    next_token = rivals.of(readings, rivals.next_token, first.layer, first.offset)
    bigram = rivals.of(readings, rivals.bigram, None, first.offset)
    found = [values for values in (next_token, bigram) if values is not None]
    found = [values for values in found if not np.isnan(values).all()]
    best = max(found, key=lambda values: float(np.nanmean(values)), default=None)
    precision, precision_interval = places.mean(own)
    surprisal, surprisal_interval = places.mean(mean_of(own_readings, "surprisal"))
    shuffled_mean, shuffled_interval = places.mean(control)
    gain, gain_interval = places.mean(own - control)
    lead, lead_interval = (None, (None, None)) if best is None else places.mean(own - best)
    assert first.layer is not None
    assert first.target_layer is not None
    return PromptRow(
        prompt=name,
        layer=first.layer,
        target_layer=first.target_layer,
        offset=first.offset,
        mode=first.mode,
        n=int((~np.isnan(own)).sum()),
        precision=precision,
        precision_interval=precision_interval,
        precision_5=places.mean(mean_hits(own_readings, 5))[0],
        precision_10=places.mean(mean_hits(own_readings, 10))[0],
        text_precision=places.mean(mean_hits(own_readings, 1, "text_rank"))[0],
        surprisal=surprisal,
        surprisal_interval=surprisal_interval,
        nll=places.mean(mean_of(own_readings, "nll"))[0],
        kl=places.mean(mean_of(own_readings, "kl"))[0],
        shuffled=shuffled_mean,
        shuffled_interval=shuffled_interval,
        gain=gain,
        gain_interval=gain_interval,
        shuffled_surprisal=places.mean(mean_of(shuffled_readings, "surprisal"))[0],
        next_token=None if next_token is None else places.mean(next_token)[0],
        bigram=None if bigram is None else places.mean(bigram)[0],
        lead=lead,
        lead_interval=lead_interval,
    )


def rival_row(key: ReadingKey, reading: PromptReading, places: PositionSample) -> RivalRow:
    """The row of a probe."""
    own = hits(reading)
    precision, interval = places.mean(own)
    return RivalRow(
        probe=key.name,
        layer=key.layer,
        offset=key.offset,
        n=int((~np.isnan(own)).sum()),
        precision=precision,
        precision_interval=interval,
        precision_5=places.mean(hits(reading, 5))[0],
        precision_10=places.mean(hits(reading, 10))[0],
        text_precision=places.mean(hits(reading, 1, "text_rank"))[0],
        surprisal=places.mean(reading.values["surprisal"])[0],
        nll=places.mean(reading.values["nll"])[0],
        kl=places.mean(reading.values["kl"])[0],
    )


@dataclass(frozen=True)
class Rivals:
    """Names of the probes that stand beside every row."""

    next_token: str | None
    """The vocabulary probe of [state; embedding of the next token]."""
    bigram: str | None

    @staticmethod
    def of(
        readings: Mapping[ReadingKey, PromptReading],
        name: str | None,
        layer: int | None,
        offset: int,
    ) -> np.ndarray | None:
        """Hits of a probe, `(n,)`; None where it has no reading."""
        if name is None:
            return None
        reading = readings.get(ReadingKey(name, layer, None, offset, "probe"))
        return None if reading is None else hits(reading)
