"""Memory of the pieces that a service sends: kept by the process, not given back each time."""

import ctypes
import ctypes.util
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of the two parameters in glibc's `malloc.h`."""


def keep_freed_memory(most: int = 256 << 20) -> None:
    """Let glibc keep up to `most` freed bytes for the next pieces; other systems do as they do.

    Without that each piece of some MB is new memory, which the system clears, page by page: about
    as much work as sending it. Only for the process of a service.
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_TRIM_THRESHOLD, most)
