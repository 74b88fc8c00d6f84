"""Every error a user can meet, with the exit code the command line gives it.

    ResiduaError                 1
    ├── UsageError               2   (also ValueError) a request that cannot be right
    │   ├── DataError            2   texts that cannot be read or are empty
    │   ├── ModelError           2   a model that cannot be loaded or captured
    │   ├── InputTypeError       2   (also TypeError) rows or labels of a type that is not read
    │   └── NotFoundError        2   (also FileNotFoundError) no such cache, probe, layer
    ├── MismatchError            3   two things that do not belong together
    │   └── HeadMismatchError    3   the stored head does not give the model's logits
    ├── CorruptError             4   bytes on disk are not what was written
    ├── IncompleteError          2   extraction was not finished
    ├── LeaseLostError           1   another worker took over what this one was writing
    ├── NoSpaceError             5   (also OSError) the disk is, or would be, full
    └── Interrupted             130   stopped by the user; the work done so far is kept

A message says what was expected, what was found and what to do. What is no error, but changes
what a result means, is a `ResiduaWarning`; the command line prints it as `Warning: ...`.
"""


class ResiduaError(Exception):
    """Base of every error that this package raises for a user's mistake or a damaged cache."""

    exit_code = 1


class UsageError(ResiduaError, ValueError):
    """The request cannot be right: an unknown option value, a layer out of range."""

    exit_code = 2


class DataError(UsageError):
    """The texts cannot be read, or hold nothing."""


class ModelError(UsageError):
    """The model cannot be loaded, or its residual stream or head cannot be captured."""


class InputTypeError(UsageError, TypeError):
    """Rows, labels or numbers are of a type that cannot be read."""


class NotFoundError(UsageError, FileNotFoundError):
    """There is no such cache, probe or layer."""


class IncompleteError(UsageError):
    """The extraction of this cache was not finished."""


class MismatchError(ResiduaError):
    """Two things do not belong together: a probe and a cache, a cache and a request."""

    exit_code = 3


class HeadMismatchError(MismatchError):
    """The stored head does not reproduce the model's logits."""


class CorruptError(ResiduaError):
    """Bytes on disk are not what was written."""

    exit_code = 4


class LeaseLostError(ResiduaError):
    """Another worker took over what this one was writing; nothing is lost."""


class NoSpaceError(ResiduaError, OSError):
    """The disk is full, or would be."""

    exit_code = 5


class Interrupted(ResiduaError):
    """The user stopped the work; what is committed is kept and the same command goes on."""

    exit_code = 130


class ResiduaWarning(UserWarning):
    """A result is not what its name promises: a measure is undefined, a fit is not validated."""
