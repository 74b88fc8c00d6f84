"""Which shards of a cache are committed, and with which checksum: asked once for every request.

A committed shard never changes, and its crc32c names its content. The journal is read again only
when its folder changed.
"""

import os
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path

from ...cache.errors import ResiduaError
from ...cache.files.paths import is_remote
from ...cache.format.journal import Journal, ShardRecord

RECORDS = 1024
"""Commit records of a cache that are remembered."""
CACHES = 64
"""Caches whose records are remembered."""
STORE_SECONDS = 5.0
"""Time for which the journal of a cache in an object store is not listed again."""
_SHARD = re.compile(r"arrays\.zarr/(.+)/c/(0|[1-9]\d{0,9})(?:/0)*", re.ASCII | re.DOTALL)


class CommittedShards:
    """Records of the shards of the caches under `root`. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._caches: OrderedDict[str, _JournalRecords] = OrderedDict()
        self._lock = threading.Lock()

    def record_of(self, cache: str, name: str) -> ShardRecord | None:
        """The record of the file `name` of the cache with the id `cache`; None for other files."""
        if (match := _SHARD.fullmatch(name)) is None:
            return None
        with self._lock:
            records = self._caches.pop(cache, None) or _JournalRecords(self.root / cache)
            self._caches[cache] = records
            while len(self._caches) > CACHES:
                self._caches.popitem(last=False)
            return records.record_of(match[1], int(match[2]))


class _JournalRecords:
    """The commit records of one cache, as far as they were asked for."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "journal"
        self._name = str(self._folder)
        self._is_remote = is_remote(cache)
        self._signature: object = None
        self._names: dict[str, list[str]] = {}
        self._arrays: OrderedDict[str, dict[str, ShardRecord]] = OrderedDict()
        self._tables: dict[str, dict[str, ShardRecord]] | None = None
        self._journal = Journal(self._folder)

    def record_of(self, array: str, shard: int) -> ShardRecord | None:
        """The record of a shard of `array`; None if no whole record names it."""
        try:
            self._forget_changed()
            if not array.startswith(("residual/", "logits/")):
                if self._tables is None:
                    self._tables = self._journal.base()[0]
                return self._tables.get(array, {}).get(str(shard))
            return self._arrays_of(f"{shard:08d}").get(array)
        except (ResiduaError, OSError):  # a damaged journal: nothing counts as committed
            return None

    def _forget_changed(self) -> None:
        """Forget all records if a record was added, replaced or removed."""
        if self._is_remote:
            signature: object = int(time.monotonic() / STORE_SECONDS)
        else:
            status = os.stat(self._name, follow_symlinks=False)
            signature = status.st_dev, status.st_ino, status.st_mtime_ns
        if signature == self._signature:
            return
        self._journal, self._tables = Journal(self._folder), None
        self._arrays.clear()
        self._names = {}
        for path in self._journal.paths():
            self._names.setdefault(path.name.partition(".")[0], []).append(path.name)
        self._signature = signature

    def _arrays_of(self, part: str) -> dict[str, ShardRecord]:
        """Array -> shard, of all records of the part with the digits `part`, the later first."""
        arrays = self._arrays.get(part)
        if arrays is None:
            arrays = {}
            for name in self._names.get(part, ()):
                arrays |= self._journal.read_record(name).arrays
            self._arrays[part] = arrays
            while len(self._arrays) > RECORDS:
                self._arrays.popitem(last=False)
        return arrays
