"""Limits of this process: open files, size of a file, threads and memory, and errors about them.

`disk_errors.py` turns an error that `limit_error` knows into a `LimitError`. The writers and memory
maps of shards (`format/shard.py`), of which a process has many, ask `leaves_free_files`.
"""

import errno
import os
import resource

from ..errors import LimitError

COUNTED_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EAGAIN)
"""Error numbers of limits of open files, the size of a file, threads and processes."""
NO_THREAD = "can't start new thread"
"""Message of Python's `RuntimeError` for a thread that the system refuses."""
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "failed to map segment from shared object",
    os.strerror(errno.ENOMEM),
)
"""Parts of the messages of libraries that get no memory, and raise no `MemoryError`."""


def raise_file_limit() -> bool:
    """Raise the soft limit of open files to the hard limit; False if it is there already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS refuses an infinite limit
        return False
    return True


def open_file_limit() -> int:
    """Number of files that this process may have open at a time."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def leaves_free_files(descriptor: int) -> bool:
    """Whether half of the files that this process may open are free, after raising the limit.

    `descriptor` is that of a file that was just opened: the system gives the lowest free number.
    """
    return descriptor < open_file_limit() // 2 or (
        raise_file_limit() and descriptor < open_file_limit() // 2
    )


def limit_error(error: BaseException, number: int) -> LimitError | None:
    """The limit that `error` met; None for another error. `number` is its errno, 0 without one."""
    if number == errno.EMFILE:
        return LimitError(
            f"too many open files: this process may have {open_file_limit():,} open at a time; "
            "raise the limit (ulimit -n 4096, or its hard limit) and give the same command again"
        )
    if number == errno.ENFILE:
        return LimitError(
            "too many open files on this machine; close other programs and give the same command "
            "again"
        )
    if number == errno.EFBIG:
        return LimitError(
            f"{getattr(error, 'filename', None) or 'a file'} became too large: "
            f"{_file_size_limit()}; raise the limit, or choose another disk, and give the same "
            "command again"
        )
    message = str(error)
    if number == errno.EAGAIN or NO_THREAD in message:
        return LimitError(
            f"the system starts no further thread or process: {_process_limit()}; end other "
            "processes, raise the limit, or work with fewer threads (OMP_NUM_THREADS=1), and give "
            "the same command again"
        )
    has_no_memory = any(text in message for text in NO_MEMORY)
    if number == errno.ENOMEM or isinstance(error, MemoryError) or has_no_memory:
        size = resource.getrlimit(resource.RLIMIT_AS)[0]
        limit = "" if size == resource.RLIM_INFINITY else f" of {size / 1e9:.3g} GB (ulimit -v)"
        reason = message.splitlines()[0] if message else "no memory left"
        return LimitError(
            f"the memory{limit} is used up ({reason}); close other programs, or let a fit take "
            "less (--memory), an extraction smaller batches (--batch-tokens)"
        )
    return None


def _file_size_limit() -> str:
    """The largest file that this process may write, in words."""
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size == resource.RLIM_INFINITY:
        return "the file system takes no larger ones"
    return f"this process may write files of {size:,} bytes (ulimit -f)"


def _process_limit() -> str:
    """The number of threads and processes that the user may have, in words."""
    count = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if count == resource.RLIM_INFINITY:
        return "the limit of this container or machine is reached"
    return f"this user may have {count:,} (ulimit -u), or the container's limit is reached"
