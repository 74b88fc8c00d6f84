"""The one-dimensional arrays of a cache, worked out from its token stream block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..files.disk_columns import ComputedColumn, NumberColumn, take_rows
from .token_stream import DOCUMENT_OF_TOKENS, KeptRuns, TokenStream

TABLE_DTYPES = {
    "tokens/ids": "<i4",
    "tokens/sequence": "<i4",
    "tokens/index": "<i4",
    "sequences/row_id": "<i8",
    "sequences/start": "<i8",
    "sequences/length": "<i4",
    "sequences/split": "u1",
    "sequences/hash": "<u8",
    "sequences/document": "<u8",
}
"""The one-dimensional arrays of every cache; the part before the slash names their axis."""
SPAN_DTYPES = {"tokens/row_id": "<i8", "tokens/char_start": "<i4", "tokens/char_stop": "<i4"}
"""Where each token came from, in caches that were made from texts."""

CONTEXT_DTYPES = {
    "sequences/context": "<i4",
    "context/ids": "<i4",
    "context/row_id": "<i8",
    "contexts/start": "<i8",
    "contexts/length": "<i4",
}
"""Whole sequences that went through the model, where not all their positions are kept."""
_DTYPES = TABLE_DTYPES | SPAN_DTYPES | CONTEXT_DTYPES


def index_arrays(stream: TokenStream, hashes: np.ndarray) -> dict[str, NumberColumn]:
    """The arrays of `stream` by name, in their stored dtypes; `hashes` are its `digests`."""
    runs = stream.runs or KeptRuns(
        np.arange(len(stream.lengths)), np.zeros(len(stream.lengths), np.int64), stream.lengths
    )
    places = _Places(runs, stream.starts)
    values: dict[str, NumberColumn] = {
        "tokens/ids": _of_kept(stream, stream.ids, places),
        "tokens/sequence": places.column(places.run),
        "tokens/index": places.column(places.index),
        "sequences/row_id": stream.row_ids[runs.sequence],
        "sequences/start": places.ends - runs.length,
        "sequences/length": runs.length,
        "sequences/split": stream.sequence_splits[runs.sequence],
        "sequences/hash": hashes[runs.sequence],
    }
    if stream.format > 1:
        values["sequences/document"] = stream.sequence_documents[runs.sequence]
    values |= {n: _of_kept(stream, found, places) for n, found in stream.token_arrays.items()}
    values |= {name: found[runs.sequence] for name, found in stream.sequence_arrays.items()}
    if stream.runs is not None:
        values |= {
            "sequences/context": runs.sequence,
            "context/ids": stream.ids,
            "contexts/start": stream.starts,
            "contexts/length": stream.lengths,
        }
        if stream.format > 1 and DOCUMENT_OF_TOKENS in stream.token_arrays:
            values["context/row_id"] = stream.token_arrays[DOCUMENT_OF_TOKENS]
    return {name: _as_stored(name, found) for name, found in values.items()}


@dataclass(frozen=True)
class _Places:
    """Where each position of the cache is, worked out for a range of positions at a time."""

    runs: KeptRuns
    starts: np.ndarray
    """First token of each sequence."""

    @cached_property
    def ends(self) -> np.ndarray:
        """Position after each run."""
        return np.cumsum(self.runs.length)

    @property
    def positions(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def column(self, read: Callable[[int, int], np.ndarray]) -> ComputedColumn:
        return ComputedColumn(self.positions, np.dtype(np.int64), read)

    def run(self, start: int, stop: int) -> np.ndarray:
        """Number of the run of each position."""
        return np.searchsorted(self.ends, np.arange(start, stop), side="right")

    def index(self, start: int, stop: int) -> np.ndarray:
        """Index of each position in its sequence."""
        run = self.run(start, stop)
        first = self.runs.first - self.ends + self.runs.length
        return np.arange(start, stop) + first[run]

    def token(self, start: int, stop: int) -> np.ndarray:
        """Token of each position, counted over all sequences."""
        return self.index(start, stop) + self.starts[self.runs.sequence[self.run(start, stop)]]


def _of_kept(stream: TokenStream, values: NumberColumn, places: _Places) -> ComputedColumn:
    """`values`, one per token of `stream`, at the positions that are kept."""
    if stream.runs is None:
        return ComputedColumn(len(values), values.dtype, lambda start, stop: values[start:stop])
    return ComputedColumn(
        places.positions,
        values.dtype,
        lambda start, stop: take_rows(values, places.token(start, stop)),
    )


def _as_stored(name: str, values: NumberColumn) -> NumberColumn:
    dtype = np.dtype(_DTYPES.get(name, values.dtype.str))
    if dtype == values.dtype:
        return values
    if isinstance(values, np.ndarray):
        return values.astype(dtype)
    return ComputedColumn(len(values), dtype, lambda start, stop: values[start:stop])
