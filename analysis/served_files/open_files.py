"""Files kept open for several requests: one descriptor each, the least recently used are closed.

`ServedFiles` reads from them; opening follows no link below the root (`confined_files.py`).
"""

import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from ...cache.files.confined_files import open_regular

LOOK_STEP = 1 << 20
"""Distance, in bytes, of the bytes that are looked at to see whether a range is in memory."""
REOPEN_SECONDS = 5.0
"""Time after which a file is opened anew, so that every folder above it is looked at again."""
_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class OpenFile:
    """A regular file that is open for reading, shared by all requests for it."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.path = path
        self.readers = 1
        """Requests that read it now."""
        self.opened: float = time.monotonic()
        self.is_kept = True
        """Whether it stays open without readers."""
        self.set_status(os.fstat(descriptor))

    def set_status(self, status: os.stat_result) -> None:
        """Take over size and times of the file."""
        self.identity: tuple[int, int] = status.st_dev, status.st_ino
        self.size: int = status.st_size
        self.modified: float = status.st_mtime
        self.state: tuple[int, ...] = (
            *self.identity,
            self.size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        """Numbers that differ once the file was replaced or written to."""

    def is_in_memory(self, start: int, stop: int) -> bool:
        """Whether some bytes all over `start:stop` are in the page cache; False if unknown."""
        if _NOWAIT is None:
            return False
        byte = [bytearray(1)]
        try:
            for position in (*range(start, stop - 1, LOOK_STEP), stop - 1):
                os.preadv(self.descriptor, byte, position, _NOWAIT)
        except OSError:  # not in memory, or a file system that cannot tell
            return False
        return True


class OpenFiles:
    """Open files by name, at most `limit` beside those that are being read.

    Each use compares the open file with the one that has the name now; at times it is opened anew.
    Safe to use from several threads.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: str) -> OpenFile | None:
        """The open file of this name, as one more reader; None if it must be opened."""
        file = self._files.get(name)
        if file is None:
            return None
        status = None
        if time.monotonic() < file.opened + REOPEN_SECONDS:
            # Links may be followed here: it must be the very file that was opened without links.
            with suppress(OSError):
                status = os.stat(file.path)
        with self._lock:
            if self._files.get(name) is not file:
                return None
            if status is None or (status.st_dev, status.st_ino) != file.identity:
                self._drop(self._files.pop(name))
                return None
            file.set_status(status)
            file.readers += 1
            self._files.move_to_end(name)
            return file

    def add(self, root: Path, name: str) -> OpenFile:
        """Open the file `name` below `root`, with one reader; raises as `open_regular`."""
        file = OpenFile(open_regular(root, name), f"{os.fspath(root)}/{name}")
        with self._lock:
            if (earlier := self._files.pop(name, None)) is not None:
                self._drop(earlier)
            self._files[name] = file
            while len(self._files) > self.limit:
                self._drop(self._files.popitem(last=False)[1])
        return file

    def give_back(self, file: OpenFile) -> None:
        """End the use of one reader."""
        with self._lock:
            file.readers -= 1
            if not file.is_kept and not file.readers:
                os.close(file.descriptor)

    def close(self) -> None:
        """Close all files that nobody reads; the others close when they are given back."""
        with self._lock:
            while self._files:
                self._drop(self._files.popitem()[1])

    def _drop(self, file: OpenFile) -> None:
        """Close a file that was taken out, now or when its last reader gives it back."""
        file.is_kept = False
        if not file.readers:
            os.close(file.descriptor)
