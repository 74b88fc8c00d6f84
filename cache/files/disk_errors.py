"""Translation of disk and object-store errors into residua's, with advice for the user.

Context managers for code that writes: `translate_disk_errors` for one folder (a cache, a scratch
folder), `translate_store_errors` for one object store, `translate_any_disk_errors` around whole
commands. A full disk raises `NoSpaceError`, an unwritable one `UsageError`, a vanished folder
`NotFoundError`, a limit of the process (`process_limits.py`) `LimitError`; messages say what is
kept and what to do. `check_writable` and `check_target` find such errors before long work.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..errors import (
    CorruptError,
    DataError,
    ModelError,
    NoSpaceError,
    NotFoundError,
    ResiduaError,
    UsageError,
)
from .json_files import make_folder
from .paths import check_creates, check_not_served, is_remote, store_error_code
from .process_limits import COUNTED_LIMITS, NO_THREAD, limit_error

FULL_DISK = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "your quota on the disk of {} is used up",
}
"""Error number of a disk without space -> message, with the folder to fill in."""
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a disk, folder or file that this process may not write."""
VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Error numbers of a file or folder that was removed, renamed or unmounted."""
MAX_CAUSES = 8
"""Number of errors, each the cause of the one before, that are looked at."""
STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
"""Libraries whose errors are those of an object store."""
NAMED_IN_TEXT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO)
"""Error numbers that are found by their text in messages of torch, which raises no OSError."""
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""Error number in messages of safetensors and tokenizers, which raise no OSError."""


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Translate errors of the disk or store of `folder`, which the context writes.

    Raises `NoSpaceError` for a full disk, `UsageError` for an unwritable one, `NotFoundError` if
    the folder vanished; errors that do not concern `folder` pass unchanged.
    """
    try:
        yield
    except (CorruptError, NotFoundError) as error:
        if is_remote(folder):
            raise
        # A cache that vanishes during a read looks damaged.
        if folder.is_dir():
            raise
        raise _vanished_error(folder) from error
    except ResiduaError:
        raise
    except Exception as error:
        translate = _translate_store_error if is_remote(folder) else _translate_disk_error
        translated = translate(error, folder)
        if translated is None:
            raise
        raise translated from error


@contextmanager
def translate_store_errors(root: Path) -> Iterator[None]:
    """Translate errors of the object store of `root`; nothing to do for a folder on disk."""
    with translate_disk_errors(root) if is_remote(root) else nullcontext():
        yield


@contextmanager
def translate_any_disk_errors() -> Iterator[None]:
    """Translate errors of any disk that is full, unwritable, failing or removed, and of limits.

    A model or texts that cannot be read because of a full disk or a limit are no mistake of the
    user: then the disk or the limit is named.
    """
    try:
        yield
    except (DataError, ModelError) as error:
        if (reason := _hidden_system_error(error)) is None:
            raise
        raise reason from error
    except ResiduaError:
        raise
    except Exception as error:
        translated = system_error(error)
        if translated is None:
            raise
        raise translated from error


def system_error(error: BaseException) -> ResiduaError | None:
    """The disk or the limit that `error`, or a cause of `error`, met; None for another error."""
    for cause in _causes(error):
        number, name = _errno_of(cause), getattr(cause, "filename", None)
        where = f": {name}" if name else ""
        if limit := limit_error(cause, number):
            return limit
        if number == errno.EIO:
            return UsageError(
                f"the disk fails ({os.strerror(number).lower()}){where}; check it, then see with "
                "`residua verify` what of a cache is damaged"
            )
        if number in FULL_DISK:
            return NoSpaceError(
                f"{os.strerror(number)}{where}; what was written is kept: free some space and "
                "give the same command again"
            )
        if number in VANISHED and name and cause is error:
            return NotFoundError(
                f"{name} vanished while it was used (removed, renamed or unmounted?); if it comes "
                "back, give the same command again"
            )
        if number in UNWRITABLE and (cause is error or name):
            return UsageError(
                f"{os.strerror(number)}{where}; what was written is kept: change the permissions, "
                "or name another place"
            )
    return None


def _hidden_system_error(error: ResiduaError) -> ResiduaError | None:
    """The full disk, or the limit of files or threads, that `error` was raised for."""
    for cause in () if error.__context__ is None else _causes(error.__context__):
        number = _errno_of(cause)
        if number in FULL_DISK or number in COUNTED_LIMITS or NO_THREAD in str(cause):
            return system_error(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, then the errors that it was raised from or while handling, latest first."""
    for _ in range(MAX_CAUSES):
        yield error
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return
        error = cause


def check_writable(root: Path) -> None:
    """Make `root` and open a temporary file in it; raises as `translate_disk_errors`.

    An object store must have conditional creation instead (`check_creates`).
    """
    with translate_disk_errors(root):
        if is_remote(root):
            check_creates(root)
            return
        make_folder(root)
        with tempfile.TemporaryFile(dir=root):  # without a name, if the system supports that
            pass


def check_target(path: Path) -> None:
    """Raise `UsageError` unless a file or folder can be written at `path`; makes its parent.

    Called before long work, so that no result is lost.
    """
    if is_remote(path):
        check_not_served(path)
        return
    try:
        make_folder(path.parent)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
    except OSError as error:
        if error.errno in FULL_DISK or limit_error(error, error.errno or 0):
            raise
        raise UsageError(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}); name another "
            "place"
        ) from None


def check_file_target(path: Path, name: str) -> None:
    """`check_target` for a file; raises `UsageError` for a folder, too, with `name` as example."""
    if not is_remote(path) and path.is_dir():
        raise UsageError(f"{path} is a folder; name a file such as {path / name}")
    check_target(path)


def _translate_disk_error(error: Exception, folder: Path) -> ResiduaError | None:
    """The error that describes the disk of `folder`; None if `error` is about another matter."""
    number = next(filter(None, map(_errno_of, _causes(error))), 0)
    if limit := next(filter(None, (limit_error(e, _errno_of(e)) for e in _causes(error))), None):
        return limit
    if number in FULL_DISK:
        return NoSpaceError(
            f"{FULL_DISK[number].format(folder)}; parts that are committed are kept: free some "
            "space and give the same command again, it goes on from there"
        )
    number = _errno_of(error)
    if not _concerns(error, folder):
        return None
    if number in UNWRITABLE:
        return UsageError(
            f"{folder} cannot be written ({os.strerror(number).lower()}); what is in it is kept: "
            "make it writable and give the same command again, or choose another --root"
        )
    # `mkdir` of a folder that is there, and is removed before `is_dir`, says that it exists.
    is_gone = number == errno.EEXIST and not os.path.lexists(str(getattr(error, "filename", "")))
    return _vanished_error(folder) if number in VANISHED or is_gone else None


def _translate_store_error(error: Exception, folder: Path) -> ResiduaError | None:
    """The message of the store's client with advice; None if the error is not of a store."""
    library = type(error).__module__.split(".")[0]
    if not isinstance(error, OSError) and library not in STORE_CLIENTS:
        return None
    name = getattr(error, "filename", None)
    if isinstance(name, str | os.PathLike) and Path(name).is_absolute():
        return None  # a file of this machine
    message = str(error)
    if message in ("", "None"):
        message = store_error_code(error) or type(error).__name__
    if isinstance(error, PermissionError):
        advice = "check the credentials, and what they may do there"
    elif isinstance(error, FileNotFoundError):
        advice = "make the bucket, or name another --root"
    else:
        advice = "check the address of the store (AWS_ENDPOINT_URL for s3://) and the credentials"
    return UsageError(f"the object store of {folder} says: {message}; {advice}")


def _errno_of(error: BaseException) -> int:
    """The `errno` of an error, 0 for an error without a number."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    message = str(error)
    if match := _RUST_ERRNO.search(message):
        return int(match[1] or match[2])
    return next((n for n in NAMED_IN_TEXT if os.strerror(n) in message), 0)


def _concerns(error: Exception, folder: Path) -> bool:
    """Whether an error names a file under `folder`, a folder above it, or no file."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike):
        return True
    path = Path(os.path.abspath(name))
    absolute_folder = Path(os.path.abspath(folder))
    return path.is_relative_to(absolute_folder) or absolute_folder.is_relative_to(path)


def _vanished_error(folder: Path) -> NotFoundError:
    return NotFoundError(
        f"{folder} vanished, or files in it, while it was written (removed, renamed or "
        "unmounted?); if it comes back, its committed parts are as they were: give the same "
        "command again"
    )
