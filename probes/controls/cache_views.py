"""Views of a cache in which what a probe reads, or what it is to predict, is another thing.

A view is a cache to every fit. Its layers 0 to L are what probes read. The layer that they are to
predict has a number of its own, `depth` = L + 1, so that each side can be changed alone.
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
    import torch

    from ...cache.format.array import CacheArray
    from ...cache.format.journal import PartRecord

SHARED = ("head", "layers", "sequence_hash", "sequence_length", "sequence_split", "sequence_start")


class CacheView(ActivationCache):
    """A cache whose last layer has another number to those who predict it; nothing else differs."""

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
        return f"{self.base.id}+{self.name}-{self.seed}"

    @property
    def depth(self) -> int:
        """Number of the layer to predict, one more than the cache's last one."""
        return self.base.n_blocks + 1

    @cached_property
    def committed(self) -> "dict[int, PartRecord]":
        """Committed parts; the layer to predict is the last one."""
        own, last = f"residual/{self.depth}", f"residual/{self.base.n_blocks}"
        return {
            part: replace(record, arrays={**record.arrays, own: record.arrays[last]})
            for part, record in self.base.committed.items()
        }

    def array(self, name: str) -> "CacheArray":
        """A stored array by its name, as it is in the cache."""
        last = name == f"residual/{self.depth}"
        return self.base.array(f"residual/{self.base.n_blocks}" if last else name)

    def layer(self, layer: int) -> Any:
        """What a probe of `layer` reads; for `depth`, what it is to predict."""
        return self._target if layer == self.depth else self._source(layer)

    @cached_property
    def _target(self) -> Any:
        return self.base.residual_array(self.base.n_blocks)

    def _source(self, layer: int) -> Any:
        return self.base.residual_array(layer)


class ShuffledStates(CacheView):
    """Probes read the state of another position, and are to predict what follows this one."""

    name = "shuffled"

    @cached_property
    def _order(self) -> PositionShuffle:
        return PositionShuffle(self.base, self.seed)

    def _source(self, layer: int) -> Any:
        return ShuffledRows(self.base.residual_array(layer), self._order)


class PermutedLabels(CacheView):
    """Probes read the state of this position, and are to predict what follows another one."""

    name = "permuted"

    @cached_property
    def _order(self) -> PositionShuffle:
        return PositionShuffle(self.base, self.seed)

    @cached_property
    def _target(self) -> Any:
        return ShuffledRows(self.base.residual_array(self.base.n_blocks), self._order)

    @cached_property
    def tokens(self) -> Any:
        """Token ids as labels: those of other positions, `(positions,)` int32."""
        return ShuffledRows(self.base.tokens, self._order)

    def following_tokens(self, positions: np.ndarray, across_documents: bool = False) -> np.ndarray:
        """Tokens that follow in the text as labels: those of other positions, `(n,)` int64."""
        if not is_sparse(self.base):
            return super().following_tokens(positions, across_documents)
        return self.base.following_tokens(self._order(positions), across_documents)


class NextToken(CacheView):
    """Probes read [residual_l[t]; residual_0[t+1]], the state and the next token's embedding.

    The layer to predict has d_model zeros behind it, so that all rows are equally wide.
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
        return ConcatenatedRows(self.base.residual_array(self.base.n_blocks), None, self._following)

    def _source(self, layer: int) -> Any:
        return ConcatenatedRows(
            self.base.residual_array(layer), self.base.residual_array(0), self._following
        )

    def _following(self, rows: np.ndarray) -> np.ndarray:
        """The next position of each of `rows`; itself at the end of a sequence."""
        sequence = np.searchsorted(self.sequence_start, rows, "right") - 1
        ends = self.sequence_start[sequence] + self.sequence_length[sequence]
        return np.minimum(rows + 1, ends - 1)


CONTROLS = {view.name: view for view in (ShuffledStates, PermutedLabels, NextToken)}
"""Views by name."""


class ViewRows:
    """What fits read of a `CacheArray`, for rows that come from elsewhere."""

    def __init__(self, source: Any) -> None:
        self.path, self.layout = source.path, source.layout
        self.shape, self.ndim, self.dtype = source.shape, source.ndim, source.dtype

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
        """Rows `start:stop` in the dtype of `layout`, into `out` if given."""
        found = self.take_stored(np.arange(start, stop))
        if out is None:
            return found
        out[...] = found
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order; floats come as float32."""
        raise NotImplementedError

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, in any order, in the dtype of `layout`."""
        raise NotImplementedError


class ShuffledRows(ViewRows):
    """Rows of other positions."""

    def __init__(self, source: Any, order: PositionShuffle) -> None:
        super().__init__(source)
        self._source, self._order = source, order

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._source.take(self._order(_numbers(rows)))

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        return self._source.take_stored(self._order(_numbers(rows)))


class ConcatenatedRows(ViewRows):
    """Rows of an array beside others (zeros for None) of following positions; float32."""

    def __init__(self, source: Any, other: Any, following: Any) -> None:
        super().__init__(source)
        self._source, self._other, self._following = source, other, following
        self.shape = (source.shape[0], 2 * source.shape[1])
        self.dtype = np.dtype(np.float32)
        self.layout = replace(
            source.layout, shape=self.shape, stored_dtype="<f4", logical_dtype="float32"
        )

    def take(self, rows: np.ndarray) -> np.ndarray:
        rows = _numbers(rows)
        out = np.zeros((len(rows), self.shape[1]), np.float32)
        width = self.shape[1] // 2
        out[:, :width] = self._source.take(rows)
        if self._other is not None:
            out[:, width:] = self._other.take(self._following(rows))
        return out

    def take_stored(self, rows: np.ndarray) -> np.ndarray:
        return self.take(rows)


def _numbers(rows: np.ndarray) -> np.ndarray:
    """Numbers of rows, of a mask too."""
    return np.flatnonzero(rows) if rows.dtype == bool else rows


class HeadOfFirstHalf:
    """A head that reads the first `d_model` columns of rows `(..., 2 d_model)`."""

    kind = "program"
    """To fits: no unembedding of its own, its logits are differentiated as they are."""

    def __init__(self, head: Any, d_model: int) -> None:
        self._head, self.vocab, self.digest = head, head.vocab, head.digest
        self.d_model, self._width = 2 * d_model, d_model

    def __dask_tokenize__(self) -> str:
        return f"{self.digest}-{self._width}"

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits in float32, `(..., vocab)`."""
        return self._head.logits(hidden[..., : self._width])

    def torch(self, device: str = "cpu") -> "TorchHeadOfFirstHalf":
        """The same head for torch tensors, differentiable."""
        return TorchHeadOfFirstHalf(self._head.torch(device), self._width)


class TorchHeadOfFirstHalf:
    """`HeadOfFirstHalf` on torch tensors."""

    def __init__(self, head: Any, d_model: int) -> None:
        self._torch, self._width = head, d_model
        self.head = HeadOfFirstHalf(head.head, d_model)

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits, `(..., vocab)`."""
        return self._torch(hidden[..., : self._width])


def view_of(cache: ActivationCache, control: str, seed: int) -> CacheView:
    """The view of `cache` with the name `control`."""
    if control not in CONTROLS:
        raise UsageError(f"control must be one of {', '.join(CONTROLS)}, not {control!r}")
    return CONTROLS[control](cache, seed)
