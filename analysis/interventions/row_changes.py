"""Changes of rows of a layer: `RowChange` functions that replace, add to, or ablate rows.

A change gets rows `(k, d_model)` float32 and the numbers `(k,)` of their positions in the sample,
and gives the new rows. The rows it gets stay unchanged.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from ..studies.trajectories.position_sample import PositionSample

if TYPE_CHECKING:
    import torch

    from ...probes.basis.layer_basis import LayerBasis

RowChange = Callable[["torch.Tensor", np.ndarray], "torch.Tensor"]


def replace_by(row: np.ndarray) -> RowChange:
    """Put `row` `(d_model,)` in the place of every row: zero, a mean, an optimal constant."""

    def change(rows: "torch.Tensor", _: np.ndarray) -> "torch.Tensor":
        return _like(row, rows).expand_as(rows).clone()

    return change


def add_vector(vector: np.ndarray, scale: float = 1.0) -> RowChange:
    """Add `scale` times `vector` `(d_model,)` to every row."""

    def change(rows: "torch.Tensor", _: np.ndarray) -> "torch.Tensor":
        return rows if scale == 0 else rows + scale * _like(vector, rows)

    return change


def resample_rows(sample: PositionSample, layer: int) -> RowChange:
    """Put the row of another position of the sample, drawn at random, in the place of each row."""
    if sample.count < 2:
        raise UsageError("resampling needs two positions at least; raise --max-positions")
    rng = np.random.default_rng([sample.seed, 11])
    order = rng.permutation(sample.count)
    donors = np.empty(sample.count, np.int64)
    donors[order] = np.roll(order, 1)  # a single cycle: no position is its own donor
    array = sample.cache.residual_array(layer)

    def change(rows: "torch.Tensor", numbers: np.ndarray) -> "torch.Tensor":
        taken = np.asarray(array.take(sample.positions[donors[numbers]]), np.float32)
        return _like(taken, rows)

    return change


def remove_component(basis: "LayerBasis", amount: float = 1.0, k: int | None = None) -> RowChange:
    """Take `amount` times the component on the first `k` directions of `basis` away.

    The component is that of the rows less the reference: 0 changes nothing, 1 removes it (an
    ablation), more inverts it, negative amounts amplify it.
    """

    def change(rows: "torch.Tensor", _: np.ndarray) -> "torch.Tensor":
        if amount == 0:
            return rows
        return rows - amount * (rows - basis.ablate(rows, k))

    return change


def _like(array: np.ndarray, rows: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.array(array, np.float32)).to(rows)
