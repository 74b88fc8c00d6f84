"""Translation of disk and object-store errors into residua's, with advice for the user.

Context managers for code that writes: `translate_disk_errors` for one folder (a cache, a scratch
folder), `translate_store_errors` for one object store, `translate_any_disk_errors` around whole
commands. A full disk raises `NoSpaceError`, an unwritable one `UsageError`, a vanished folder
`NotFoundError`; messages say what is kept and what to do. `check_writable` and `check_target` find
such errors before long work.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..errors import CorruptError, NoSpaceError, NotFoundError, ResiduaError, UsageError
from .json_files import make_folder
from .paths import check_creates, is_remote, store_error_code

FULL_DISK = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "your quota on the disk of {} is used up",
}
"""Error number of a disk without space -> message, with the folder to fill in."""
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a disk, folder or file that this process may not write."""
VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Error numbers of a file or folder that was removed, renamed or unmounted."""
STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
"""Libraries whose errors are those of an object store."""
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
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
    """Translate errors of any disk that is full, unwritable, failing or removed."""
    try:
        yield
    except ResiduaError:
        raise
    except Exception as error:
        number, name = _errno_of(error), getattr(error, "filename", None)
        where = f": {name}" if name else ""
        if number in VANISHED and name:
            raise NotFoundError(
                f"{name} vanished while it was used (removed, renamed or unmounted?); if it comes "
                "back, give the same command again"
            ) from error
        if number == errno.EIO:
            raise UsageError(
                f"the disk fails ({os.strerror(number).lower()}){where}; check it, then see with "
                "`residua verify` what of a cache is damaged"
            ) from error
        message = f"{os.strerror(number)}{where}; what was written is kept"
        if number in FULL_DISK:
            raise NoSpaceError(
                f"{message}: free some space and give the same command again"
            ) from error
        if number in UNWRITABLE:
            raise UsageError(f"{message}: change the permissions, or name another place") from error
        raise


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
        return
    try:
        make_folder(path.parent)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}); name another "
            "place"
        ) from None


def _translate_disk_error(error: Exception, folder: Path) -> ResiduaError | None:
    """The error that describes the disk of `folder`; None if `error` is about another matter."""
    number = _errno_of(error)
    if number in FULL_DISK:
        return NoSpaceError(
            f"{FULL_DISK[number].format(folder)}; parts that are committed are kept: free some "
            "space and give the same command again, it goes on from there"
        )
    if not _concerns(error, folder):
        return None
    if number in UNWRITABLE:
        return UsageError(
            f"{folder} cannot be written ({os.strerror(number).lower()}); what is in it is kept: "
            "make it writable and give the same command again, or choose another --root"
        )
    return _vanished_error(folder) if number in VANISHED else None


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


def _errno_of(error: Exception) -> int:
    """The `errno` of an error, 0 for an error without a number."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST_ERRNO.search(str(error))
    return int(match[1]) if match else 0


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
