"""Sums of shifted rows and of their products: the accumulator of one pass over a cache, float64.

Rows are shifted by a constant near their mean, the same in the whole pass: sums of several runs
are then added entry by entry, and the mean is taken out at the end without cancellation.

The sources of a pair at offset N are the rows with at least N rows after them in their segment, the
part of a sequence that comes from one document. A pass keeps its rows apart by *reach*: rows of
reach i have a target at exactly the first i+1 offsets. Second moments of x at an offset are the
sums over its reach and all larger ones, so that no offset needs a product of its own, and nothing
is ever subtracted.
"""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from .moments import Moments, sum_of_squares

LayerOffsetTarget = tuple[int, int, int]
"""(layer, offset, target layer)."""
Shift = dict[int, np.ndarray]
"""Constant that is subtracted from the rows of each layer, `(d_model,)` float64."""
FIELDS = ("n", "x", "xx", "y", "yy", "xy")
"""Arrays of `ShiftedSums`."""


class ShiftedSums:
    """Sums over pairs of several layers, offsets, targets and folds; all but `n` are float64."""

    def __init__(
        self,
        layers: Sequence[int],
        offsets: Sequence[int],
        targets: Sequence[int],
        folds: int,
        d_model: int,
    ) -> None:
        self.layers: tuple[int, ...] = tuple(layers)
        self.offsets: tuple[int, ...] = tuple(offsets)
        self.targets: tuple[int, ...] = tuple(targets)
        reaches = folds, len(offsets)
        self.n: np.ndarray = np.zeros(reaches, np.int64)
        """Number of rows x, by fold and reach."""
        self.x: np.ndarray = np.zeros((*reaches, len(layers), d_model))
        """Sum of x, by fold, reach and layer."""
        self.xx: np.ndarray = np.zeros((*reaches, len(layers), d_model, d_model))
        """Sum of x x', by fold, reach and layer."""
        self.y: np.ndarray = np.zeros((*reaches, len(targets), d_model))
        """Sum of y, by fold, offset and target layer."""
        self.yy: np.ndarray = np.zeros((*reaches, len(targets)))
        """Sum of |y|^2, by fold, offset and target layer."""
        self.xy: np.ndarray = np.zeros((*reaches, len(targets), len(layers), d_model, d_model))
        """Sum of x y', by fold, offset, target layer and layer."""

    def add_targets(self, fold: int, offset: int, target: int, y: np.ndarray) -> None:
        """Add shifted rows `y` `(n, d_model)`; `offset` and `target` are indices."""
        self.y[fold, offset, target] += y.sum(axis=0)
        self.yy[fold, offset, target] += sum_of_squares(y)

    def add_rows(
        self, fold: int, reach: int, layer: int, x: np.ndarray, ys: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Add shifted rows `x` `(n, d_model)` with their targets `ys`, by offset and target layer.

        `reach` and `layer` are indices.
        """
        product = np.empty((x.shape[1], x.shape[1]), x.dtype)
        self.x[fold, reach, layer] += x.sum(axis=0)
        # numpy takes the symmetric product (SYRK), half the work of a GEMM.
        self.xx[fold, reach, layer] += np.matmul(x.T, x, out=product)
        for offset, targets in enumerate(ys):
            for target, y in enumerate(targets):
                self.xy[fold, offset, target, layer] += np.matmul(x.T, y, out=product)

    def add(self, other: Self) -> Self:
        """Add the sums of other rows, shifted by the same constants, in place."""
        for name in FIELDS:
            total = getattr(self, name)
            total += getattr(other, name)
        return self

    def moments(self, shift: dict[int, np.ndarray]) -> dict[LayerOffsetTarget, tuple[Moments, ...]]:
        """Moments per fold, of rows that were shifted by `shift`. Overwrites these sums."""
        # Sources at an offset: the rows of its reach and of all larger ones.
        for reach in range(len(self.offsets) - 2, -1, -1):
            for sums in (self.n, self.x, self.xx):
                sums[:, reach] += sums[:, reach + 1]
        pairs: dict[LayerOffsetTarget, list[Moments]] = {}
        for fold in range(len(self.n)):
            for pair, moments in self._fold_moments(fold, shift):
                pairs.setdefault(pair, []).append(moments)
        return {pair: tuple(folds) for pair, folds in pairs.items()}

    def _fold_moments(
        self, fold: int, shift: dict[int, np.ndarray]
    ) -> Iterator[tuple[LayerOffsetTarget, Moments]]:
        """Centred moments of every pair in a fold: sum x y' - n mean(x) mean(y)', shifted rows."""
        for i, layer in enumerate(self.layers):
            for j, offset in enumerate(self.offsets):
                n = int(self.n[fold, j])
                dx, mean_x = root_n_mean(self.x[fold, j, i], n, shift[layer])
                xx = self.xx[fold, j, i]
                xx -= np.outer(dx, dx)
                for k, target in enumerate(self.targets):
                    dy, mean_y = root_n_mean(self.y[fold, j, k], n, shift[target])
                    xy = self.xy[fold, j, k, i]
                    xy -= np.outer(dx, dy)
                    yy = max(float(self.yy[fold, j, k] - dy @ dy), 0.0)
                    yield (layer, offset, target), Moments(n, mean_x, mean_y, xx, xy, yy)


def root_n_mean(total: np.ndarray, n: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(n) times the mean of n shifted rows with the sum `total`, and the mean of the rows."""
    if n == 0:
        return np.zeros_like(total), np.zeros_like(total)
    return total / np.sqrt(n), shift + total / n
