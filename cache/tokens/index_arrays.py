"""The one-dimensional arrays of a cache (`tokens/*`, `sequences/*`, `context*/*`) of a stream.

`create_cache.py` writes them before the first layer; `extraction/plan.py` sizes them by their
dtypes. Arrays of one number per position are `ComputedColumn`s, computed block by block.
"""

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
"""Arrays of every cache -> stored dtype; the part before the slash names the axis."""
SPAN_DTYPES = {"tokens/row_id": "<i8", "tokens/char_start": "<i4", "tokens/char_stop": "<i4"}
"""Arrays of the source of each token (document, characters), in caches made from texts."""

CONTEXT_DTYPES = {
    "sequences/context": "<i4",
    "context/ids": "<i4",
    "context/row_id": "<i8",
    "contexts/start": "<i8",
    "contexts/length": "<i4",
}
"""Arrays of whole contexts, in caches of some positions only."""
_STORED_DTYPES = TABLE_DTYPES | SPAN_DTYPES | CONTEXT_DTYPES


def compute_index_arrays(stream: TokenStream, hashes: np.ndarray) -> dict[str, NumberColumn]:
    """The arrays of `stream` by name, in their stored dtypes.

    `hashes` `(sequences,)` uint64 are the second value of `stream.digests()`.
    """
    # If all positions are kept, each sequence is one run.
    runs = stream.runs or KeptRuns(
        np.arange(len(stream.lengths)), np.zeros(len(stream.lengths), np.int64), stream.lengths
    )
    locations = _PositionLocations(runs, stream.starts)
    values: dict[str, NumberColumn] = {
        "tokens/ids": _kept_values(stream, stream.ids, locations),
        "tokens/sequence": locations.column(locations.run),
        "tokens/index": locations.column(locations.index),
        "sequences/row_id": stream.row_ids[runs.sequence],
        "sequences/start": locations.ends - runs.length,
        "sequences/length": runs.length,
        "sequences/split": stream.sequence_splits[runs.sequence],
        "sequences/hash": hashes[runs.sequence],
    }
    if stream.format > 1:
        values["sequences/document"] = stream.sequence_documents[runs.sequence]
    for name, column in stream.token_arrays.items():
        values[name] = _kept_values(stream, column, locations)
    for name, array in stream.sequence_arrays.items():
        values[name] = array[runs.sequence]
    if stream.runs is not None:
        values |= {
            "sequences/context": runs.sequence,
            "context/ids": stream.ids,
            "contexts/start": stream.starts,
            "contexts/length": stream.lengths,
        }
        if stream.format > 1 and DOCUMENT_OF_TOKENS in stream.token_arrays:
            values["context/row_id"] = stream.token_arrays[DOCUMENT_OF_TOKENS]
    return {name: _cast_to_stored_dtype(name, column) for name, column in values.items()}


@dataclass(frozen=True)
class _PositionLocations:
    """Run, index and token of each position of the cache, computed for a range of positions."""

    runs: KeptRuns
    starts: np.ndarray
    """Index of the first token of each sequence, `(sequences,)`."""

    @cached_property
    def ends(self) -> np.ndarray:
        """Position after each run, `(runs,)`."""
        return np.cumsum(self.runs.length)

    @property
    def positions(self) -> int:
        """Number of positions of the cache."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def column(self, compute: Callable[[int, int], np.ndarray]) -> ComputedColumn:
        """A column of one int64 per position; `compute(start, stop)` is a method below."""
        return ComputedColumn(self.positions, np.dtype(np.int64), compute)

    def run(self, start: int, stop: int) -> np.ndarray:
        """Run number of each position start..stop-1."""
        return np.searchsorted(self.ends, np.arange(start, stop), side="right")

    def index(self, start: int, stop: int) -> np.ndarray:
        """Index of each position start..stop-1 in its sequence."""
        run = self.run(start, stop)
        first = self.runs.first - self.ends + self.runs.length
        return np.arange(start, stop) + first[run]

    def token(self, start: int, stop: int) -> np.ndarray:
        """Token index, counted over all sequences, of each position start..stop-1."""
        return self.index(start, stop) + self.starts[self.runs.sequence[self.run(start, stop)]]


def _kept_values(
    stream: TokenStream, values: NumberColumn, locations: _PositionLocations
) -> ComputedColumn:
    """The `values`, a column over all tokens of `stream`, at the kept positions."""
    if stream.runs is None:
        return ComputedColumn(len(values), values.dtype, lambda start, stop: values[start:stop])
    return ComputedColumn(
        locations.positions,
        values.dtype,
        lambda start, stop: take_rows(values, locations.token(start, stop)),
    )


def _cast_to_stored_dtype(name: str, values: NumberColumn) -> NumberColumn:
    """`values` in the stored dtype of the array `name`; labels keep their dtype."""
    dtype = np.dtype(_STORED_DTYPES.get(name, values.dtype.str))
    if dtype == values.dtype:
        return values
    if isinstance(values, np.ndarray):
        return values.astype(dtype)
    return ComputedColumn(len(values), dtype, lambda start, stop: values[start:stop])
