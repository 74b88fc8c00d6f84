"""`ChunkCache`: a least-recently-used cache of decoded chunks, bounded in bytes.

`compressed_shard.py` and `remote_shard.py` have one each per process, for the chunks of all
arrays together.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np


class ChunkCache:
    """Arrays by key, at most `max_bytes` together; the least recently used are dropped first.

    `min_chunks` arrays stay even if they are larger than `max_bytes`. Safe to use from several
    threads.
    """

    def __init__(self, max_bytes: int, min_chunks: int = 0) -> None:
        self.max_bytes = max_bytes
        self.min_chunks = min_chunks
        self.nbytes: int = 0
        """Bytes of all arrays in the cache."""
        self._chunks: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: Hashable) -> np.ndarray | None:
        """The array of `key`, now the most recently used; None if the cache lacks it."""
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: Hashable, chunk: np.ndarray) -> None:
        """Add an array, then drop others down to the limits; an array already there stays."""
        with self._lock:
            if key not in self._chunks:  # else another thread decoded the chunk meanwhile
                self._chunks[key] = chunk
                self.nbytes += chunk.nbytes
            while self.nbytes > self.max_bytes and len(self._chunks) > self.min_chunks:
                self.nbytes -= self._chunks.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all arrays."""
        with self._lock:
            self._chunks.clear()
            self.nbytes = 0
