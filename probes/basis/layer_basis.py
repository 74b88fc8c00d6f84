"""`LayerBasis`: the causal basis of one layer, applied to rows of numpy, dask or torch.

`CausalBasis` (`causal_basis.py`) holds one for each layer. Needs neither cache nor torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache.errors import UsageError
from ..base.arguments import as_array


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """k directions of the residual stream, as coordinates to read and directions to write.

    The coordinates of a row h are c = (h - reference) encoder', and c decoder is the component of
    h - reference in the span of the directions. encoder decoder' is the identity, so that
    I - encoder' decoder is a projection. In the euclidean metric encoder = decoder, with
    orthonormal rows; in the covariance metric encoder = W' S^-1/2 and decoder = W' S^1/2 with
    orthonormal W and the covariance S of the rows: the projection is oblique, as LEACE's (Belrose
    et al., 2306.03819), and a removed component is replaced by its conditional mean.
    """

    encoder: np.ndarray
    """Vectors that give the coordinates, `(k, d_model)` float32."""
    decoder: np.ndarray
    """Directions that the coordinates multiply, `(k, d_model)` float32."""
    reference: np.ndarray
    """Row whose coordinates replace those of ablated rows, `(d_model,)` float32."""

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder", "reference"):
            array = np.ascontiguousarray(getattr(self, name), np.float32)
            object.__setattr__(self, name, array)
        shapes = self.encoder.shape, self.decoder.shape, self.reference.shape
        if len(shapes[0]) != 2 or shapes[1] != shapes[0] or shapes[2] != shapes[0][1:]:
            raise UsageError(
                "encoder and decoder must be (k, d_model) and reference (d_model,), found "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
            )

    @property
    def k(self) -> int:
        """Number of directions."""
        return len(self.encoder)

    def coordinates(self, rows: Any, k: int | None = None) -> Any:
        """Coordinates `(..., k)` of `rows` `(..., d_model)` on the first `k` directions."""
        rows, encoder, _, reference = self._operands(rows, self._first(k))
        return (rows - reference) @ encoder.T

    def project(self, rows: Any, k: int | None = None) -> Any:
        """`rows` `(..., d_model)` with the first `k` coordinates only: all others are removed."""
        rows, encoder, decoder, reference = self._operands(rows, self._first(k))
        return reference + (rows - reference) @ encoder.T @ decoder

    def ablate(self, rows: Any, k: int | None = None, replacement: Any = None) -> Any:
        """`rows` `(..., d_model)` without their first `k` coordinates.

        The coordinates become those of `reference`, or of the rows `replacement`, of the same
        shape (resampling ablation).
        """
        return self._ablate(rows, self._first(k), replacement)

    def ablate_direction(self, rows: Any, direction: int, replacement: Any = None) -> Any:
        """`rows` without the coordinate number `direction` (from 0) alone; see `ablate`."""
        if not 0 <= direction < self.k:
            raise UsageError(f"the directions are 0 to {self.k - 1}, there is no {direction}")
        return self._ablate(rows, slice(direction, direction + 1), replacement)

    def _ablate(self, rows: Any, directions: slice, replacement: Any) -> Any:
        rows, encoder, decoder, reference = self._operands(rows, directions)
        if replacement is not None:
            if np.shape(replacement) != np.shape(rows):
                raise UsageError(
                    f"replacement has the shape {np.shape(replacement)}, rows have "
                    f"{np.shape(rows)}; both must be equal"
                )
            reference = self._operands(replacement, directions)[0]
        return rows - (rows - reference) @ encoder.T @ decoder

    def _first(self, k: int | None) -> slice:
        """The first `k` directions; None means all."""
        if k is None:
            return slice(0, self.k)
        if isinstance(k, bool) or int(k) != k or not 0 <= k <= self.k:
            raise UsageError(f"k must be a number from 0 to {self.k} (directions), not {k!r}")
        return slice(0, int(k))

    def _operands(self, rows: Any, directions: slice) -> tuple[Any, Any, Any, Any]:
        """`rows`, encoder, decoder and reference as arrays or tensors of one kind and dtype.

        Rows of a dtype narrower than float32 are cast to float32; float64 stays.
        """
        encoder, decoder = self.encoder[directions], self.decoder[directions]
        if type(rows).__module__.partition(".")[0] == "torch":
            import torch

            rows = rows if rows.dtype == torch.float64 else rows.float()
            arrays = (
                torch.from_numpy(array).to(rows.device, rows.dtype)
                for array in (encoder, decoder, self.reference)
            )
            self._check_width(rows.shape)
            return rows, *arrays  # pyright: ignore[reportReturnType]
        rows = as_array(rows, "rows", known_length=False)
        self._check_width(rows.shape)
        dtype = np.float64 if rows.dtype == np.float64 else np.float32
        arrays = (array.astype(dtype) for array in (encoder, decoder, self.reference))
        return rows.astype(dtype), *arrays  # pyright: ignore[reportReturnType]

    def _check_width(self, shape: tuple[int, ...]) -> None:
        """Raise `UsageError` unless `shape` is (..., d_model)."""
        width = self.encoder.shape[1]
        if tuple(shape)[-1:] != (width,):
            raise UsageError(f"expected rows (..., {width}), found shape {tuple(shape)}")
