"""Guess, then refine (2510.18871): early layers say frequent tokens, and later ones revise them.

Tokens are put in buckets by their rank in the frequency of the cache's contexts: the 10 most
frequent ids, the next 90, the next 900, and the rest. A guess is the top token of a lens below the
last layer; it is revised if the model's top token is another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import Trajectories

BUCKETS = {"top 10": 10, "11-100": 100, "101-1000": 1000, "rest": None}
"""Name of a bucket -> last frequency rank in it."""


@dataclass(frozen=True)
class EarlyGuessRow:
    """The guesses of one lens at one layer that fall in one bucket of frequency."""

    lens: str
    layer: int
    bucket: str
    """Frequency rank of the guessed token, or `all`."""
    n: int
    """Guesses of the bucket."""
    share: float | None
    """Share of all guesses of the layer that fall in the bucket."""
    share_interval: Interval
    model_share: float | None
    """The same of the model's own top tokens."""
    text_share: float | None
    """The same of the text's next tokens."""
    revised: float | None
    """Share of the guesses in the bucket that the model does not keep; None in the last layer."""
    revised_interval: Interval


def early_guess_rows(
    sample: PositionSample, readings: Mapping[str, Trajectories], counts: np.ndarray
) -> list[EarlyGuessRow]:
    """Guesses by lens, layer and bucket; `counts` `(vocab,)` are the frequencies of the tokens."""
    bucket_of = frequency_buckets(counts)
    rows = []
    text_bucket = _buckets_at(sample.text_tokens, bucket_of)
    for lens in readings.values():
        model_bucket = _buckets_at(lens.top[:, -1], bucket_of)
        for column, layer in enumerate(lens.layers):
            top = lens.top[:, column]
            guessed = _buckets_at(top, bucket_of)
            is_last = column == len(lens.layers) - 1
            revised = np.where((top < 0) | (lens.top[:, -1] < 0), np.nan, top != lens.top[:, -1])
            for number, bucket in enumerate(("all", *BUCKETS)):
                inside = guessed >= 0 if bucket == "all" else guessed == number - 1
                share, share_interval = sample.mean(np.where(guessed < 0, np.nan, inside))
                given_up, given_up_interval = sample.mean(np.where(inside, revised, np.nan))
                rows.append(
                    EarlyGuessRow(
                        lens=str(lens.lens),
                        layer=layer,
                        bucket=bucket,
                        n=int(inside.sum()),
                        share=share,
                        share_interval=share_interval,
                        model_share=_share(model_bucket, number - 1),
                        text_share=_share(text_bucket, number - 1),
                        revised=None if is_last else given_up,
                        revised_interval=(None, None) if is_last else given_up_interval,
                    )
                )
    return rows


def frequency_buckets(counts: np.ndarray) -> np.ndarray:
    """Number of the bucket of each token id, `(vocab,)` int64; of equal counts, low ids first."""
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    ends = [end for end in BUCKETS.values() if end is not None]
    return np.searchsorted(ends, ranks, side="right")


def _buckets_at(tokens: np.ndarray, bucket_of: np.ndarray) -> np.ndarray:
    """Bucket of each token `(n,)`, -1 for the token -1."""
    return np.where(tokens < 0, -1, bucket_of[np.maximum(tokens, 0)])


def _share(buckets: np.ndarray, number: int) -> float | None:
    """Share of the known `buckets` `(n,)` with that number; of -1, all of them."""
    known = buckets[buckets >= 0]
    if not len(known):
        return None
    return 1.0 if number < 0 else float((known == number).mean())
