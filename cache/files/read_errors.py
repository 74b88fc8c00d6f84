"""Reading of files on a disk that fails: `CorruptError` that names the file, instead of `OSError`.

`read_file` reads the small files of caches and probes; `check_readable` is for files that are then
memory-mapped (shards: `format/shard.py`; moments: `probes/moments/moment_set.py`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CorruptError

UNREADABLE = tuple(
    getattr(errno, name) for name in ("EIO", "EBADMSG", "EUCLEAN") if hasattr(errno, name)
)
"""Error numbers of files that a failing disk, or a damaged file system, cannot read."""
READ_BYTES = 1 << 20
"""Bytes of one read of `check_readable`."""


def read_file(path: Path) -> bytes:
    """The bytes of a file; raises `CorruptError` if the disk fails, and `OSError` otherwise."""
    with translate_read_errors(path):
        return path.read_bytes()


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Raise `CorruptError` for the error of a disk that cannot read the file `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        reason = (error.strerror or str(error)).lower()
        raise CorruptError(
            f"{path} cannot be read ({reason}): the disk fails; check the disk, and let `residua "
            "verify` name all that is lost"
        ) from error


def check_readable(path: Path, start: int = 0, stop: int | None = None) -> None:
    """Read the bytes `start:stop` of a file, by default all, and drop them.

    For files that are memory-mapped then: a page of a map that the disk cannot read kills the
    process (SIGBUS). Raises `CorruptError` if the disk fails, or the file is shorter.
    """
    with translate_read_errors(path), path.open("rb") as file:
        stop = os.fstat(file.fileno()).st_size if stop is None else stop
        while start < stop:
            count = len(os.pread(file.fileno(), min(READ_BYTES, stop - start), start))
            if not count:
                raise CorruptError(f"{path} was cut short")
            start += count
