"""Sums of shifted rows and of their products: what a pass over a cache adds up, in float64.

Rows are shifted by a constant near their mean, the same in the whole pass: sums of several runs
are then added entry by entry, and the mean is taken out at the end without cancellation.

The sources of a pair at offset N are the rows with at least N rows after them in their segment, the
part of a sequence that comes from one document.
A pass keeps its rows apart by *kind*: rows of kind i have a target at the first i+1 offsets and at
no further one. Second moments of x at an offset are those of its kind and of all later ones, so
that no offset needs a product of its own, and nothing is ever subtracted.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .moments import Moments, sum_of_squares

LayerOffsetTarget = tuple[int, int, int]
"""(layer, offset, target layer)."""
FIELDS = ("n", "x", "xx", "y", "yy", "xy")


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
        self.layers, self.offsets, self.targets = tuple(layers), tuple(offsets), tuple(targets)
        kinds = folds, len(offsets)
        self.n = np.zeros(kinds, np.int64)
        """Rows x, by fold and kind."""
        self.x = np.zeros((*kinds, len(layers), d_model))
        self.xx = np.zeros((*kinds, len(layers), d_model, d_model))
        self.y = np.zeros((*kinds, len(targets), d_model))
        """Of the targets, by fold, offset and layer."""
        self.yy = np.zeros((*kinds, len(targets)))
        self.xy = np.zeros((*kinds, len(targets), len(layers), d_model, d_model))

    def add_targets(self, fold: int, offset: int, target: int, y: np.ndarray) -> None:
        """Add shifted rows `y` `(n, d_model)`; offset and target are places in their lists."""
        self.y[fold, offset, target] += y.sum(axis=0)
        self.yy[fold, offset, target] += sum_of_squares(y)

    def add_rows(
        self, fold: int, kind: int, layer: int, x: np.ndarray, ys: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Add shifted rows `x` `(n, d_model)` of one kind with `ys`, by offset and target."""
        product = np.empty((x.shape[1], x.shape[1]), x.dtype)
        self.x[fold, kind, layer] += x.sum(axis=0)
        # numpy takes the symmetric product (SYRK), half the work of a GEMM.
        self.xx[fold, kind, layer] += np.matmul(x.T, x, out=product)
        for offset, targets in enumerate(ys):
            for target, y in enumerate(targets):
                self.xy[fold, offset, target, layer] += np.matmul(x.T, y, out=product)

    def add(self, other: "ShiftedSums") -> None:
        """Add the sums of other rows, shifted by the same constants."""
        for name in FIELDS:
            mine = getattr(self, name)
            mine += getattr(other, name)

    def moments(self, shift: dict[int, np.ndarray]) -> dict[LayerOffsetTarget, tuple[Moments, ...]]:
        """Moments per fold; `shift` is what rows were shifted by. Uses up these sums."""
        for kind in range(len(self.offsets) - 2, -1, -1):
            for sums in (self.n, self.x, self.xx):
                sums[:, kind] += sums[:, kind + 1]
        pairs: dict[LayerOffsetTarget, list[Moments]] = {}
        for fold in range(len(self.n)):
            for pair, found in self._of_fold(fold, shift):
                pairs.setdefault(pair, []).append(found)
        return {pair: tuple(parts) for pair, parts in pairs.items()}

    def _of_fold(
        self, fold: int, shift: dict[int, np.ndarray]
    ) -> Iterator[tuple[LayerOffsetTarget, Moments]]:
        for i, layer in enumerate(self.layers):
            for j, offset in enumerate(self.offsets):
                n = int(self.n[fold, j])
                dx, mean_x = centre(self.x[fold, j, i], n, shift[layer])
                xx = self.xx[fold, j, i]
                xx -= np.outer(dx, dx)
                for k, target in enumerate(self.targets):
                    dy, mean_y = centre(self.y[fold, j, k], n, shift[target])
                    xy = self.xy[fold, j, k, i]
                    xy -= np.outer(dx, dy)
                    yy = max(float(self.yy[fold, j, k] - dy @ dy), 0.0)
                    yield (layer, offset, target), Moments(n, mean_x, mean_y, xx, xy, yy)


def centre(total: np.ndarray, n: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the mean from `shift` times the root of n, and the mean itself."""
    if n == 0:
        return np.zeros_like(total), np.zeros_like(total)
    return total / np.sqrt(n), shift + total / n
