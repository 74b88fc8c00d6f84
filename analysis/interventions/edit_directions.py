"""Directions along which rows are edited: classes of rows, tokens through a lens, causal bases.

All are a `LayerBasis` of one direction d with an encoder e, e d = 1: the component of a row h is
((h - reference) e) d. For two classes of rows, those before either of two tokens, with difference D
of their means and covariance S of all rows:

mean-difference   e = d = D / |D|, the reference midway between the class means
erasure           e = S^-1 D / |S^-1/2 D|, d = D / |S^-1/2 D|: LEACE (Belrose et al., 2306.03819),
                  after which no linear probe tells the classes apart; the reference is the mean
token             e = d = the gradient of the difference of the two logits of a lens, of length 1,
                  its norm held fixed; the reference is the mean
random            a random direction of length 1 in the covariance metric; the reference is the mean
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.tokens.segments import neighbour_tokens
from ...probes.basis.coordinates import AblationCoordinates
from ...probes.basis.layer_basis import LayerBasis
from ...probes.moments.moments import Accumulator, Moments
from .layer_runs import train_positions

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

KINDS = ("mean-difference", "erasure", "token", "random")
FEWEST = 4
"""Fewest rows of a class behind its mean."""


@dataclass(frozen=True, eq=False)
class LayerClasses:
    """Moments of the rows of one layer, and the means of two classes of them."""

    layer: int
    moments: Moments
    """Of all finite rows with themselves."""
    means: tuple[np.ndarray, np.ndarray] | None
    """Mean rows before the first and before the second token; None for classes too small."""
    counts: tuple[int, int]

    @classmethod
    def collect(
        cls, cache: "ActivationCache", layer: int, tokens: tuple[int, int], seed: int = 0
    ) -> "LayerClasses":
        """Read rows of the train split once; those before either of `tokens` are the classes."""
        positions = train_positions(cache, seed)
        following = neighbour_tokens(cache, positions, 1)
        d = cache.d_model
        total = Accumulator(d, d)
        sums, counts = np.zeros((2, d)), [0, 0]
        for block in np.array_split(np.arange(len(positions)), max(1, len(positions) // 4096)):
            rows = np.asarray(cache.residual_array(layer).take(positions[block]), np.float64)
            finite = np.isfinite(rows).all(1)
            total.update(rows[finite], rows[finite])
            for number, token in enumerate(tokens):
                own = rows[finite & (following[block] == token)]
                sums[number] += own.sum(0)
                counts[number] += len(own)
        means = None
        if min(counts) >= FEWEST:
            means = (sums[0] / counts[0], sums[1] / counts[1])
        return cls(layer, total.result(), means, (counts[0], counts[1]))

    def _difference(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Difference and middle of the class means; raises `UsageError` without classes."""
        if self.means is None:
            raise UsageError(
                f"the direction {kind!r} needs {FEWEST} rows before each word at least, the train "
                f"split has {self.counts[0]} and {self.counts[1]}; extract more text with these "
                "words, or use the direction 'token'"
            )
        first, second = self.means
        if not np.abs(first - second).max() > 0:
            raise UsageError(f"both words have the same mean row at layer {self.layer}")
        return first - second, (first + second) / 2

    def direction(
        self,
        kind: str,
        *,
        lens_map: Any = None,
        logit_row: np.ndarray | None = None,
        seed: int = 0,
    ) -> LayerBasis:
        """The direction of `kind` at this layer.

        `logit_row` `(d,)` is the difference of the tokens' unembedding rows times the gain of the
        norm, for `token`; `lens_map` the affine map of the lens to layer L (None: logit lens).
        """
        mean = self.moments.mean_x
        if kind == "mean-difference":
            difference, middle = self._difference(kind)
            unit = difference / np.linalg.norm(difference)
            return _basis(unit, unit, middle)
        coordinates = AblationCoordinates.of(self.moments, "covariance")
        if kind == "erasure":
            difference, _ = self._difference(kind)
            whitened = coordinates.whiten.T @ difference
            whitened /= np.linalg.norm(whitened)
            return _basis(coordinates.whiten @ whitened, whitened @ coordinates.unwhiten, mean)
        if kind == "token":
            if logit_row is None:
                raise UsageError("the direction 'token' needs the rows of the unembedding")
            vector = logit_row if lens_map is None else np.asarray(lens_map.weight) @ logit_row
            unit = vector / np.linalg.norm(vector)
            return _basis(unit, unit, mean)
        encoder, decoder = coordinates.random(1, seed)
        return LayerBasis(encoder, decoder, mean.astype(np.float32))


def token_logit_row(cache: "ActivationCache", tokens: tuple[int, int]) -> np.ndarray:
    """Gradient of the difference of two logits after the norm's division, `(d,)` float64.

    Raises `UsageError` for a head without a plain unembedding.
    """
    head = cache.head
    if head.kind != "explicit":
        raise UsageError(
            "the head of this model has no plain unembedding, so a token has no direction of its "
            "own; use the directions mean-difference or erasure"
        )
    first, second = (head.unembedding[token].astype(np.float64) for token in tokens)
    row = (first - second) * head.norm_weight
    if head.norm == "layernorm":
        row = row - row.mean()
    if not np.abs(row).max() > 0:
        raise UsageError("both words have one row in the unembedding: they cannot be told apart")
    return row


def _basis(encoder: np.ndarray, decoder: np.ndarray, reference: np.ndarray) -> LayerBasis:
    return LayerBasis(
        encoder[None].astype(np.float32),
        decoder[None].astype(np.float32),
        reference.astype(np.float32),
    )
