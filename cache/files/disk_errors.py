"""What the operating system says of a disk, as errors that say what is kept and what to do."""

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

FULL = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "your quota on the disk of {} is used up",
}
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
"""Libraries whose errors are those of an object store."""
_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which raise no OSError, give the number of one."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk under `folder`, which is written within the context, become ours.

    Raises `NoSpaceError` for a full disk, `UsageError` for one that cannot be written,
    `NotFoundError` if the folder vanished; errors that are not about `folder` pass unchanged.
    """
    try:
        yield
    except (CorruptError, NotFoundError) as error:
        if is_remote(folder):
            raise
        # To a reader that is in the middle of it, a cache that vanished looks damaged.
        if folder.is_dir():
            raise
        raise _vanished(folder) from error
    except ResiduaError:
        raise
    except Exception as error:
        found = _of_store(error, folder) if is_remote(folder) else _translate(error, folder)
        if found is None:
            raise
        raise found from error


@contextmanager
def store_errors(root: Path) -> Iterator[None]:
    """Errors of the object store of `root`, whatever is done there, become ours."""
    with disk_errors(root) if is_remote(root) else nullcontext():
        yield


@contextmanager
def any_disk_errors() -> Iterator[None]:
    """Errors of any disk become ours: one that is full, cannot be written, fails, or has gone."""
    try:
        yield
    except ResiduaError:
        raise
    except Exception as error:
        number, name = _number(error), getattr(error, "filename", None)
        where = f": {name}" if name else ""
        if number in GONE and name:
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
        if number in FULL:
            raise NoSpaceError(
                f"{message}: free some space and give the same command again"
            ) from error
        if number in READ_ONLY:
            raise UsageError(f"{message}: change the permissions, or name another place") from error
        raise


def check_writable(root: Path) -> None:
    """Make `root` and open a file in it; raises as `disk_errors` does.

    An object store must also refuse to create an object twice: see `check_creates`.
    """
    with disk_errors(root):
        if is_remote(root):
            check_creates(root)
            return
        make_folder(root)
        with tempfile.TemporaryFile(dir=root):  # one without a name, where the system has such
            pass


def check_target(path: Path) -> None:
    """Raise `UsageError` unless a file or folder can be written at `path`, whose parent is made.

    To be asked before long work, so that its result is not lost.
    """
    if is_remote(path):
        return
    try:
        make_folder(path.parent)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}); name another "
            "place"
        ) from None


def _translate(error: Exception, folder: Path) -> ResiduaError | None:
    number = _number(error)
    if number in FULL:
        return NoSpaceError(
            f"{FULL[number].format(folder)}; parts that are committed are kept: free some space "
            "and give the same command again, it goes on from there"
        )
    if not _concerns(error, folder):
        return None
    if number in READ_ONLY:
        return UsageError(
            f"{folder} cannot be written ({os.strerror(number).lower()}); what is in it is kept: "
            "make it writable and give the same command again, or choose another --root"
        )
    return _vanished(folder) if number in GONE else None


def _of_store(error: Exception, folder: Path) -> ResiduaError | None:
    """What the client of an object store says; None if the error is not of a store."""
    library = type(error).__module__.split(".")[0]
    if not isinstance(error, OSError) and library not in CLIENTS:
        return None
    name = getattr(error, "filename", None)
    if isinstance(name, str | os.PathLike) and Path(name).is_absolute():
        return None  # a file of this machine
    what = str(error)
    if what in ("", "None"):
        what = store_error_code(error) or type(error).__name__
    if isinstance(error, PermissionError):
        advice = "check the credentials, and what they may do there"
    elif isinstance(error, FileNotFoundError):
        advice = "make the bucket, or name another --root"
    else:
        advice = "check the address of the store (AWS_ENDPOINT_URL for s3://) and the credentials"
    return UsageError(f"the object store of {folder} says: {what}; {advice}")


def _number(error: Exception) -> int:
    """The `errno` of an error, 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST.search(str(error))
    return int(match[1]) if match else 0


def _concerns(error: Exception, folder: Path) -> bool:
    """Whether an error is about a file under `folder`, above it, or names no file."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike):
        return True
    path = Path(os.path.abspath(name))
    whole = Path(os.path.abspath(folder))
    return path.is_relative_to(whole) or whole.is_relative_to(path)


def _vanished(folder: Path) -> NotFoundError:
    return NotFoundError(
        f"{folder} vanished, or files in it, while it was written (removed, renamed or "
        "unmounted?); if it comes back, its committed parts are as they were: give the same "
        "command again"
    )
