"""Writes the shards of one part, one per array, and commits them together.

`PartExtraction` puts rows into a `PartWriter`. Readers see the part only after its record is in the
journal (`format/journal.py`); shards and dtypes: `format/shard.py`, `format/dtypes.py`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files.leases import FileLease, Lease
from ..files.paths import TRANSFERS, is_remote
from ..format.compressed_shard import shard_writer_for
from ..format.dtypes import LARGEST, decode_rows, encode_rows
from ..format.journal import PartRecord, ShardRecord
from ..format.layout import ArrayKey, Layout, array_name
from ..format.shard import ShardWriter
from .checked_arrays import ArrayMetadata, writable_array


class PartWriter:
    """Writes the rows of one part of the arrays `keys`, then commits all of them together.

    `path` is the folder of the cache. A context manager: leaving the context drops shards that were
    not committed. `lease` is checked before any file appears, because in an object store another
    worker may have taken the part over (`LeaseLostError`).
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        part: int,
        keys: Sequence[ArrayKey],
        lease: Lease | None = None,
    ) -> None:
        self._lease = lease or FileLease()
        metadata = ArrayMetadata(path)
        arrays = {key: writable_array(metadata, array_name(key), part) for key in keys}
        self.part = part
        self.start: int
        self.stop: int
        self.start, self.stop = layout.rows(part, next(iter(arrays.values())).shape[0])
        self.dtypes: dict[ArrayKey, str] = {
            key: array.layout.logical_dtype for key, array in arrays.items()
        }
        self._row_shapes = {key: array.shape[1:] for key, array in arrays.items()}
        self._journal = metadata.journal
        self.quarantine: dict[int, str] = {}
        """Sequence -> reason, for sequences that no split shall have; goes into the record."""
        self._absmax = dict.fromkeys(keys, 0.0)
        self._nonfinite = dict.fromkeys(keys, 0)
        self._shards: dict[ArrayKey, ShardWriter] = {}
        try:
            for key, array in arrays.items():
                shard = array.path / array.layout.shard_key(part)
                # Create the folders of the shard, but not the array's own folder: a cache that was
                # removed meanwhile must not come back without its metadata.
                if not is_remote(shard):
                    for folder in reversed(shard.parents[: array.ndim]):
                        folder.mkdir(exist_ok=True)
                n_rows = self.stop - self.start
                self._shards[key] = shard_writer_for(
                    shard, array.layout, n_rows, make_folders=False
                )
        except BaseException:
            self._abandon()
            raise

    def write(self, key: ArrayKey, position: int, values: np.ndarray) -> int:
        """Encode and write rows of float32 or integers, from `position` of the cache on.

        Returns the number of non-finite values. Raises `UsageError` if the stored dtype cannot hold
        a finite value.
        """
        if values.dtype.kind != "f":
            return self.put(key, position, values, np.zeros(len(values), np.float32))
        peaks = np.abs(values.reshape(len(values), -1)).max(-1, initial=0.0)
        if reason := self.reason_too_large(key, peaks):
            raise UsageError(reason)
        return self.put(key, position, encode_rows(values, self.dtypes[key]), peaks)

    def put(self, key: ArrayKey, position: int, stored: np.ndarray, peaks: np.ndarray) -> int:
        """Write rows that are in the stored dtype already, from `position` of the cache on.

        `peaks` is the float32 |value| maximum of each row before the cast, `(rows,)`. Rows with a
        finite peak that the dtype cannot hold become NaN. Returns the number of non-finite values.
        """
        nonfinite = 0
        finite_peaks = np.isfinite(peaks)
        absmax = float(peaks[finite_peaks].max(initial=0.0))

        # Rows that the stored dtype cannot hold.
        too_large = self.too_large(key, peaks)
        if too_large.any():
            stored = np.array(stored)
            stored[too_large] = encode_rows(np.full(1, np.nan, np.float32), self.dtypes[key])[0]

        # Rows with NaN or infinities: count them, and measure the finite values of the same rows.
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

    def widen_range(self, key: ArrayKey, absmax: float) -> None:
        """Record at least `absmax`, the largest |value| before the cast, for the array `key`.

        For rows that were copied in their stored dtype from a cache whose record has it.
        """
        self._absmax[key] = max(self._absmax[key], absmax)

    def too_large(self, key: ArrayKey, peaks: np.ndarray) -> np.ndarray:
        """Mask of the rows with a finite peak that the stored dtype cannot hold, `(rows,)` bool."""
        return np.isfinite(peaks) & (peaks > LARGEST.get(self.dtypes[key], np.inf))

    def reason_too_large(self, key: ArrayKey, peaks: np.ndarray) -> str | None:
        """Message about rows that the stored dtype cannot hold; None if it holds all rows."""
        too_large = self.too_large(key, peaks)
        if not too_large.any():
            return None
        dtype = self.dtypes[key]
        wider = "bfloat16 or float32" if dtype == "float16" else "float32"
        array = f"layer {key}" if isinstance(key, int) else key
        return (
            f"{array} reaches {float(peaks[too_large].max()):.3g}, which {dtype} cannot hold "
            f"although the calibrated rows stayed below; extract with --dtype {wider}"
        )

    def commit(self, expected: PartRecord | None = None) -> PartRecord:
        """Make all shards appear, then the record of the part; returns the record.

        The record is not written if `expected`, an earlier record, has the same shards.
        """
        arrays = {
            array_name(key): ShardRecord(
                **shard, absmax=self._absmax[key], nonfinite=self._nonfinite[key]
            )
            for key, shard in self._commit_shards().items()
        }
        self._lease.check()
        record = PartRecord(self.part, self.start, self.stop, arrays, self.quarantine)
        if expected is None or any(expected.arrays.get(n) != s for n, s in arrays.items()):
            self._journal.commit(record)
        return record

    def _commit_shards(self) -> dict[ArrayKey, dict[str, int]]:
        """Make all shards appear; to an object store several are sent at a time.

        Returns array -> size and checksum of its shard.
        """

        def commit(shard: ShardWriter) -> dict[str, int]:
            self._lease.check()
            return shard.commit()

        shards = self._shards.values()
        if any(is_remote(shard.path) for shard in shards):
            with ThreadPoolExecutor(TRANSFERS) as pool:
                records = list(pool.map(commit, shards))
        else:
            records = [commit(shard) for shard in shards]
        return dict(zip(self._shards, records, strict=True))

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the shards that were not committed."""
        self._abandon()

    def _abandon(self) -> None:
        with ExitStack() as stack:  # drops all shards, even if dropping one of them fails
            for shard in self._shards.values():
                stack.callback(shard.abandon)
