"""Linear CKA of the residual streams of two models at the same tokens, for pairs of layers.

CKA(X, Y) = |Xc' Yc|^2 / (|Xc' Xc| |Yc' Yc|) with Frobenius norms and centered rows (Kornblith et
al., 1905.00414): 1 for states that are equal up to rotation and scale.
"""

from collections.abc import Sequence

import numpy as np

from ....cache.progress import Auto, Progress, show_stage
from .joined_sequences import JoinedSample

CKA_ROWS = 4096
"""Most positions that CKA reads: all layers of these are in memory."""


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of rows `(n, d_x)` and `(n, d_y)`; NaN where one side does not vary."""
    return _cka(_CenteredRows(x), _CenteredRows(y))


class _CenteredRows:
    """Rows less their mean, float64, with the norm of their scatter."""

    def __init__(self, rows: np.ndarray) -> None:
        rows = np.asarray(rows, np.float64)
        self.rows: np.ndarray = rows - rows.mean(0)
        # X'X and XX' have the same norm: the smaller one is taken.
        turned = self.rows if rows.shape[1] <= len(rows) else self.rows.T
        self.norm = float(np.linalg.norm(turned.T @ turned))


def _cka(x: _CenteredRows, y: _CenteredRows) -> float:
    """Linear CKA of centered rows."""
    if not (x.norm > 0 and y.norm > 0):
        return float("nan")
    return float(np.linalg.norm(x.rows.T @ y.rows)) ** 2 / (x.norm * y.norm)


def similarity_matrix(
    sample: JoinedSample,
    layers: tuple[Sequence[int], Sequence[int]],
    *,
    max_rows: int = CKA_ROWS,
    progress: Progress | Auto | None = "auto",
) -> tuple[np.ndarray, int]:
    """CKA of each layer of the first model with each of the other, and the positions read.

    The matrix is `(layers of the first, layers of the other)`; positions are spread evenly over the
    sample. Positions with a state that is not finite are left out.
    """
    count = sample.first.count
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_rows)).astype(np.int64))
    positions = sample.first.positions[chosen], sample.other_positions[chosen]
    states = [
        [np.asarray(cache.residual_array(layer).take(rows), np.float32) for layer in of_model]
        for cache, of_model, rows in zip(
            (sample.first.cache, sample.other.cache), layers, positions, strict=True
        )
    ]
    finite = np.logical_and.reduce([np.isfinite(x).all(1) for of_model in states for x in of_model])
    matrix = np.full((len(layers[0]), len(layers[1])), np.nan)
    if finite.sum() < 2:
        return matrix, int(finite.sum())
    with show_stage(progress, "similarity") as report:
        others = [_CenteredRows(rows[finite]) for rows in states[1]]
        for row, rows in enumerate(states[0]):
            x = _CenteredRows(rows[finite])
            matrix[row] = [_cka(x, y) for y in others]
            if report is not None:
                report(row + 1, len(matrix))
    return matrix, int(finite.sum())
