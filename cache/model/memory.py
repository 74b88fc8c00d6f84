"""Recognition of out-of-memory errors, on a GPU or on the host.

`forward/batches.py` halves a batch after such an error; `memory_errors` turns the error into a
`ModelError` for loads and checks that cannot be halved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import ModelError

T = TypeVar("T")
"""Result of a forward batch, for `forward/batches.py`."""
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error of a GPU or of the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        message in str(error).lower() for message in _MESSAGES
    )


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Context that turns an out-of-memory error into a `ModelError` with `message`.

    The message says what did not fit and what the user can do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{message} ({reason})") from error
