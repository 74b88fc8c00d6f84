"""Writes the arrays of one part and commits them at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files.leases import FileLease, Lease
from ..files.paths import TRANSFERS, is_remote
from ..format.array import CacheArray
from ..format.compressed_shard import shard_writer_for
from ..format.dtypes import LARGEST, decode_rows, encode_rows
from ..format.journal import Journal, PartRecord, ShardRecord
from ..format.layout import ArrayKey, Layout, array_name
from ..format.shard import ShardWriter


class PartWriter:
    """Writes the rows of one part of every array of `keys`, then commits them at once.

    Where a lease can be lost, `held` is looked at before anything appears.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        part: int,
        keys: Sequence[ArrayKey],
        held: Lease | None = None,
    ) -> None:
        self._held = held or FileLease()
        arrays = {key: CacheArray(path / "arrays.zarr" / array_name(key)) for key in keys}
        self.part = part
        self.start, self.stop = layout.rows(part, next(iter(arrays.values())).shape[0])
        self.dtypes = {key: array.layout.logical_dtype for key, array in arrays.items()}
        self._row_shapes = {key: array.shape[1:] for key, array in arrays.items()}
        self._journal = Journal(path / "journal")
        self.quarantine: dict[int, str] = {}
        self._absmax = dict.fromkeys(keys, 0.0)
        self._nonfinite = dict.fromkeys(keys, 0)
        self._shards: dict[ArrayKey, ShardWriter] = {}
        try:
            for key, array in arrays.items():
                path = array.path / array.layout.shard_key(part)
                # Not the array's own folder: a cache that vanished must not come back as a stump.
                if not is_remote(path):
                    for folder in reversed(path.parents[: array.ndim]):
                        folder.mkdir(exist_ok=True)
                rows = self.stop - self.start
                self._shards[key] = shard_writer_for(path, array.layout, rows, make_folders=False)
        except BaseException:
            self._abandon()
            raise

    def write(self, key: ArrayKey, position: int, values: np.ndarray) -> int:
        """Put float32 rows, or integers, at `position`; returns their non-finite values.

        Raises `UsageError` if the stored dtype turns a finite value into an infinity.
        """
        if values.dtype.kind != "f":
            return self.put(key, position, values, np.zeros(len(values), np.float32))
        peaks = np.abs(values.reshape(len(values), -1)).max(-1, initial=0.0)
        self.check(key, peaks)
        return self.put(key, position, encode_rows(values, self.dtypes[key]), peaks)

    def put(self, key: ArrayKey, position: int, stored: np.ndarray, peaks: np.ndarray) -> int:
        """Put rows that are in the stored dtype, with the float32 peak |value| of each row.

        Rows with a finite peak that this dtype does not hold become NaN. Returns the number of
        non-finite values.
        """
        nonfinite = 0
        finite_peaks = np.isfinite(peaks)
        absmax = float(peaks[finite_peaks].max(initial=0.0))
        too_large = self.too_large(key, peaks)
        if too_large.any():
            stored = np.array(stored)
            stored[too_large] = encode_rows(np.full(1, np.nan, np.float32), self.dtypes[key])[0]
        if too_large.any() or not finite_peaks.all():
            values = decode_rows(stored, self.dtypes[key])
            finite = np.isfinite(values)
            nonfinite = int(values.size - finite.sum())
            absmax = max(absmax, float(np.abs(values[finite]).max(initial=0.0)))
            stored = encode_rows(values, self.dtypes[key])  # one bit pattern for every NaN
        self._absmax[key] = max(self._absmax[key], absmax)
        self._nonfinite[key] += nonfinite
        rows = stored.reshape(len(stored), *self._row_shapes[key])
        self._shards[key].write(position - self.start, rows)
        return nonfinite

    def too_large(self, key: ArrayKey, peaks: np.ndarray) -> np.ndarray:
        """Which rows have a finite peak that the array's stored dtype does not hold."""
        return np.isfinite(peaks) & (peaks > LARGEST.get(self.dtypes[key], np.inf))

    def reason_too_large(self, key: ArrayKey, peaks: np.ndarray) -> str | None:
        """What is too large for the array's stored dtype, and what to do; None if nothing is."""
        too_large = self.too_large(key, peaks)
        if not too_large.any():
            return None
        dtype = self.dtypes[key]
        other = "bfloat16 or float32" if dtype == "float16" else "float32"
        what = f"layer {key}" if isinstance(key, int) else key
        return (
            f"{what} reaches {float(peaks[too_large].max()):.3g}, which {dtype} cannot hold "
            f"although the calibrated rows stayed below; extract with --dtype {other}"
        )

    def check(self, key: ArrayKey, peaks: np.ndarray) -> None:
        """Raise `UsageError` if a finite peak does not fit the array's stored dtype."""
        if reason := self.reason_too_large(key, peaks):
            raise UsageError(reason)

    def commit(self, expected: PartRecord | None = None) -> PartRecord:
        """Make every shard appear, then the commit record, if it says more than `expected`."""
        arrays = {
            array_name(key): ShardRecord(
                **shard, absmax=self._absmax[key], nonfinite=self._nonfinite[key]
            )
            for key, shard in self._commit_shards().items()
        }
        self._held.check()
        record = PartRecord(self.part, self.start, self.stop, arrays, self.quarantine)
        if expected is None or any(expected.arrays.get(n) != s for n, s in arrays.items()):
            self._journal.commit(record)
        return record

    def _commit_shards(self) -> dict[ArrayKey, dict[str, int]]:
        """Make every shard appear; several are sent to an object store at a time."""

        def commit(shard: ShardWriter) -> dict[str, int]:
            self._held.check()
            return shard.commit()

        shards = self._shards.values()
        if any(is_remote(shard.path) for shard in shards):
            with ThreadPoolExecutor(TRANSFERS) as pool:
                done = list(pool.map(commit, shards))
        else:
            done = [commit(shard) for shard in shards]
        return dict(zip(self._shards, done, strict=True))

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what was not committed."""
        self._abandon()

    def _abandon(self) -> None:
        with ExitStack() as stack:  # each one, even if another cannot be dropped
            for shard in self._shards.values():
                stack.callback(shard.abandon)
