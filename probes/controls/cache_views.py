"""Views of a cache with inputs or targets replaced, on which `ControlProbe` fits probes.

Every fit and every evaluation takes a view for a cache. Layers 0 to L of a view are inputs. The
target layer is numbered L + 1 (`n_blocks` of the view), although its rows come from layer L: so
inputs and targets can be replaced separately. Nothing is copied; rows are replaced as they are
read.
"""

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import is_sparse
from .position_shuffle import PositionShuffle

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ...cache.format.array import CacheArray
    from ...cache.format.journal import PartRecord
    from ...cache.format.layout import ArrayLayout

SHARED = ("head", "layers", "sequence_hash", "sequence_length", "sequence_split", "sequence_start")
"""Attributes that a view takes over from its cache."""


class CacheView(ActivationCache):
    """A cache with its last layer numbered L + 1 as the target; no row is replaced.

    Subclasses override `_input` or `_target`.
    """

    name = "same"

    def __init__(self, base: ActivationCache, seed: int = 0) -> None:
        base.residual_array(base.n_blocks)
        vars(self).update(path=base.path, manifest=base.manifest, journal=base.journal)
        vars(self).update({name: getattr(base, name) for name in SHARED})
        self.base = base
        self.seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.base, self.seed)

    @property
    def id(self) -> str:
        """Id of the cache with the view and its seed."""
        return f"{self.base.id}+{self.name}-{self.seed}"

    @property
    def n_blocks(self) -> int:
        """Number of the target layer: L + 1, one more than the cache's last layer."""
        return self.base.n_blocks + 1

    @cached_property
    def committed(self) -> "dict[int, PartRecord]":
        """Committed parts, with the shards of layer L also under the number of the target layer."""
        target, last = f"residual/{self.n_blocks}", f"residual/{self.base.n_blocks}"
        return {
            part: replace(record, arrays={**record.arrays, target: record.arrays[last]})
            for part, record in self.base.committed.items()
        }

    def array(self, name: str) -> "CacheArray":
        """A stored array by name, its rows not replaced; layer L for the target layer."""
        is_target = name == f"residual/{self.n_blocks}"
        return self.base.array(f"residual/{self.base.n_blocks}" if is_target else name)

    def residual_array(self, layer: int) -> Any:
        """Input rows of probes of `layer`; for layer L + 1, the rows to predict."""
        return self._target if layer == self.n_blocks else self._input(layer)

    def _input(self, layer: int) -> Any:
        return self.base.residual_array(layer)

    @cached_property
    def _target(self) -> Any:
        return self.base.residual_array(self.base.n_blocks)


class ShuffledStates(CacheView):
    """Inputs are the states of other positions; targets stay."""

    name = "shuffled"

    @cached_property
    def _shuffle(self) -> PositionShuffle:
        return PositionShuffle(self.base, self.seed)

    def _input(self, layer: int) -> Any:
        return ShuffledRows(self.base.residual_array(layer), self._shuffle)


class PermutedLabels(CacheView):
    """Targets, states and tokens, are those of other positions; inputs stay."""

    name = "permuted"

    @cached_property
    def _shuffle(self) -> PositionShuffle:
        return PositionShuffle(self.base, self.seed)

    @cached_property
    def _target(self) -> Any:
        return ShuffledRows(self.base.residual_array(self.base.n_blocks), self._shuffle)

    @cached_property
    def tokens(self) -> Any:
        """Token ids as labels: those of other positions, `(positions,)` int32."""
        return ShuffledRows(self.base.tokens, self._shuffle)

    def following_tokens(self, positions: np.ndarray, across_documents: bool = False) -> np.ndarray:
        """Tokens that follow in the text as labels: those of other positions, `(n,)` int64."""
        if not is_sparse(self.base):
            return super().following_tokens(positions, across_documents)
        return self.base.following_tokens(self._shuffle(positions), across_documents)


class NextToken(CacheView):
    """Inputs are [residual_l[t]; residual_0[t+1]], the state and the next token's embedding.

    The target has d_model zeros appended, so that all rows are equally wide.
    """

    name = "next-token"

    def __init__(self, base: ActivationCache, seed: int = 0) -> None:
        super().__init__(base, seed)
        base.residual_array(0)
        vars(self)["head"] = HeadOfFirstHalf(base.head, base.d_model)

    @property
    def d_model(self) -> int:
        """Width of the rows, twice that of the cache."""
        return 2 * self.base.d_model

    @cached_property
    def _target(self) -> Any:
        last = self.base.residual_array(self.base.n_blocks)
        return ConcatenatedRows(last, None, self._next_positions)

    def _input(self, layer: int) -> Any:
        state, embedding = self.base.residual_array(layer), self.base.residual_array(0)
        return ConcatenatedRows(state, embedding, self._next_positions)

    def _next_positions(self, positions: np.ndarray) -> np.ndarray:
        """The position after each of `positions`; the last one of a sequence gives itself."""
        sequence = np.searchsorted(self.sequence_start, positions, "right") - 1
        ends = self.sequence_start[sequence] + self.sequence_length[sequence]
        return np.minimum(positions + 1, ends - 1)


CONTROLS = {view.name: view for view in (ShuffledStates, PermutedLabels, NextToken)}
"""Views by the name of their control."""


def view_of(cache: ActivationCache, control: str, seed: int) -> CacheView:
    """The view of `cache` for a `control`; raises `UsageError` for an unknown name."""
    if control not in CONTROLS:
        raise UsageError(f"control must be one of {', '.join(CONTROLS)}, not {control!r}")
    return CONTROLS[control](cache, seed)


class ViewRows:
    """The reading side of a `CacheArray`, for rows that a subclass computes from `source`."""

    def __init__(self, source: Any) -> None:
        self.path: Path = source.path
        self.layout: ArrayLayout = source.layout
        self.shape: tuple[int, ...] = source.shape
        self.ndim: int = source.ndim
        self.dtype: np.dtype[Any] = source.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """The rows that the first axis selects: a slice, a number or a list."""
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, int | np.integer):
            row = range(len(self))[int(first)]
            return self.take(np.array([row]))[(0, *rest)]
        if isinstance(first, slice):
            first = np.arange(*first.indices(len(self)))
        rows = self.take(np.asarray(first))
        return rows[(slice(None), *rest)] if rest else rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`; floats come as float32."""
        return self.take(np.arange(start, stop))

    def read_stored(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` in the dtype of `layout`, written into `out` if given."""
        rows = self.take_stored(np.arange(start, stop))
        if out is None:
            return rows
        out[...] = rows
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order; floats come as float32."""
        raise NotImplementedError

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order, in the dtype of `layout`."""
        raise NotImplementedError


class ShuffledRows(ViewRows):
    """Rows of `source`, each from the position that `shuffle` gives."""

    def __init__(self, source: Any, shuffle: PositionShuffle) -> None:
        super().__init__(source)
        self._source, self._shuffle = source, shuffle

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._source.take(self._shuffle(_row_numbers(rows)))

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        return self._source.take_stored(self._shuffle(_row_numbers(rows)))


class ConcatenatedRows(ViewRows):
    """Rows of `source` beside rows of `appended` (zeros for None) one position later; float32."""

    def __init__(self, source: Any, appended: Any, next_positions: Any) -> None:
        super().__init__(source)
        self._source, self._appended, self._next_positions = source, appended, next_positions
        self.shape: tuple[int, ...] = (source.shape[0], 2 * source.shape[1])
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.layout: ArrayLayout = replace(
            source.layout, shape=self.shape, stored_dtype="<f4", logical_dtype="float32"
        )

    def take(self, rows: np.ndarray) -> np.ndarray:
        rows = _row_numbers(rows)
        joined = np.zeros((len(rows), self.shape[1]), np.float32)
        width = self.shape[1] // 2
        joined[:, :width] = self._source.take(rows)
        if self._appended is not None:
            joined[:, width:] = self._appended.take(self._next_positions(rows))
        return joined

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        return self.take(rows)


def _row_numbers(rows: np.ndarray) -> np.ndarray:
    """Row numbers; a mask is turned into the numbers that it selects."""
    return np.flatnonzero(rows) if rows.dtype == bool else rows


class HeadOfFirstHalf:
    """A head that reads the first `d_model` columns of rows `(..., 2 d_model)`."""

    kind = "program"
    """Makes fits use autograd through `torch()`, as for heads that are programs."""

    def __init__(self, head: Any, d_model: int) -> None:
        self._head = head
        self.vocab: int = head.vocab
        self.digest: str = head.digest
        self.d_model: int = 2 * d_model
        self._width = d_model

    def __dask_tokenize__(self) -> str:
        return f"{self.digest}-{self._width}"

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits in float32, `(..., vocab)`."""
        return self._head.logits(hidden[..., : self._width])

    def torch(self, device: "str | torch.device" = "cpu") -> "TorchHeadOfFirstHalf":
        """The same head for torch tensors, differentiable."""
        return TorchHeadOfFirstHalf(self._head.torch(device), self._width)


class TorchHeadOfFirstHalf:
    """`HeadOfFirstHalf` on torch tensors."""

    def __init__(self, head: Any, d_model: int) -> None:
        self._torch_head, self._width = head, d_model
        self.head: HeadOfFirstHalf = HeadOfFirstHalf(head.head, d_model)

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits, `(..., vocab)`."""
        return self._torch_head(hidden[..., : self._width])

    def write_logits(
        self, hidden: "torch.Tensor", out: "torch.Tensor", products: str = "float32"
    ) -> None:
        """Write the logits of `hidden` `(n, d_model)` into `out` `(n, vocab)`, float32."""
        self._torch_head.write_logits(hidden[..., : self._width], out, products)
