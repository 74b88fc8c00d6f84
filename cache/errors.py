"""All errors that this package raises for users, with their exit codes on the command line.

    ResiduaError                 1
    ├── UsageError               2   (also ValueError) a request that cannot be right
    │   ├── DataError            2   texts that cannot be read or are empty
    │   ├── ModelError           2   a model that cannot be loaded or captured
    │   ├── InputTypeError       2   (also TypeError) rows or labels of a type that is not read
    │   ├── MissingLibraryError  2   (also ModuleNotFoundError) a library of an extra is missing
    │   ├── InUseError           2   something to remove that is named, pinned or being written
    │   └── NotFoundError        2   (also FileNotFoundError) no such cache, probe, layer
    ├── MismatchError            3   a cache, probe or request that does not fit another
    │   └── HeadMismatchError    3   the stored head does not give the model's logits
    ├── CorruptError             4   bytes on disk are not what was written
    ├── IncompleteError          2   extraction was not finished
    ├── LeaseLostError           1   another worker took over the part that was being written
    ├── NoSpaceError             5   (also OSError) the disk is, or would be, full
    ├── LimitError               5   (also OSError) no open files, threads or memory left
    ├── UnreachableError         5   a service that does not answer, or not as it should
    └── Interrupted             130   stopped by the user; the work done so far is kept

A message says what was expected, what was found and what to do. A result that is correct, but means
less than its name promises, comes with a `ResiduaWarning`; the command line prints `Warning: ...`.
"""


class ResiduaError(Exception):
    """Base of all errors of this package: mistakes of a user, damaged caches, full disks."""

    exit_code = 1
    """Exit code of the command line."""


class UsageError(ResiduaError, ValueError):
    """A request that cannot be right: an unknown option value, a layer out of range."""

    exit_code = 2


class DataError(UsageError):
    """Texts that cannot be read, or are empty."""


class ModelError(UsageError):
    """A model that cannot be loaded, or whose residual stream or head cannot be captured."""


class InputTypeError(UsageError, TypeError):
    """Rows, labels or numbers of a type that cannot be read."""


class MissingLibraryError(UsageError, ModuleNotFoundError):
    """A library that is not installed; the message names the extra that brings it."""

    def __init__(self, message: str, name: str | None = None) -> None:
        """`name` is the library's top module, as in every `ModuleNotFoundError`."""
        ImportError.__init__(self, message, name=name)


class NotFoundError(UsageError, FileNotFoundError):
    """No cache, probe or layer has the name or number of the request."""


class InUseError(UsageError):
    """A cache or probe to remove that others still name, that is pinned, or is being written."""


class IncompleteError(UsageError):
    """A cache whose extraction is not finished, where all rows are needed."""


class MismatchError(ResiduaError):
    """A probe and a cache, or a cache and a request, that do not belong together."""

    exit_code = 3


class HeadMismatchError(MismatchError):
    """A stored head that does not reproduce the model's logits."""


class CorruptError(ResiduaError):
    """Bytes on disk that differ from the bytes that were written."""

    exit_code = 4


class LeaseLostError(ResiduaError):
    """Another worker took over a part while this worker wrote the part; no row is lost."""


class NoSpaceError(ResiduaError, OSError):
    """A disk that is full, or would be full after the request."""

    exit_code = 5


class LimitError(ResiduaError, OSError):
    """A limit of this process is reached: open files, size of a file, threads, memory."""

    exit_code = 5


class UnreachableError(ResiduaError):
    """A service that does not answer, or gives other bytes than it was asked for.

    No `OSError`: what it did not give is not damaged.
    """

    exit_code = 5


class Interrupted(ResiduaError):
    """Work that the user stopped; committed parts are kept, and the same command goes on."""

    exit_code = 130


class ResiduaWarning(UserWarning):
    """A result that means less than its name: an undefined measure, a fit without validation."""
