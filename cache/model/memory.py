"""Forward batches that do not fit into memory are halved; the size that fits is found by doubling.

Rows of a halved batch may differ in their last bits from those of the whole one, as with any
other batch size; they are the same again on a machine where the same batches fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ..errors import ModelError

if TYPE_CHECKING:
    pass


T = TypeVar("T")
_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SAYINGS)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Memory that runs out becomes a `ModelError` with `message`: what did not fit, what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{message} ({reason})") from error
