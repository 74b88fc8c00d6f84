"""Files below a cache's folder: relative names, regular files, no link on the way.

A cache may come from a stranger. Its files are named by its own records, so a name could lead out
of the folder, and a link, a FIFO or a device could stand where a file should be. Every reader of a
cache's files opens them through `open_confined`, `read_confined` and their like, or asks
`check_regular` first; whoever writes into a cache asks `confined_path` for the place. The folder of
the cache, and the folders above it, may be links: their owner chose them. An object store has no
links: there, names alone are checked.
"""

import errno
import hashlib
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CorruptError, NotFoundError
from .json_fields import MAX_JSON_BYTES
from .json_files import parse_json
from .paths import is_remote, read_object
from .read_errors import translate_read_errors

NAME_BYTES = 4096
"""Longest name of a file below a cache, in bytes."""
_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NO_FOLLOW = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
"""Error numbers of systems for a link, or a file, where a real folder is needed."""


def is_confined_name(name: Any) -> bool:
    """Whether `name` is a str such as `head/head.json`: relative, without `.` and `..`."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    try:
        if len(os.fsencode(name)) > NAME_BYTES or len(name.encode()) > NAME_BYTES:
            return False
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def check_name(folder: Path, name: Any) -> PurePosixPath:
    """`name` as a path; raises `CorruptError` unless it names a place below `folder`."""
    if not is_confined_name(name):
        raise CorruptError(
            f"{folder} names a file {str(name)[:200]!r}, which is no relative name of a file in it"
        )
    return PurePosixPath(name)


def check_regular(folder: Path, name: str) -> None:
    """Raise unless `name` is a regular file below `folder`, reached through real folders.

    Raises `CorruptError` for a link or any other kind of file, `FileNotFoundError` for no file.
    """
    parts = check_name(folder, name).parts
    if is_remote(folder):
        return
    path = os.fspath(folder)
    for number, part in enumerate(parts, 1):
        path = f"{path}/{part}"
        mode = _mode_of(path)
        is_right = stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)
        if not is_right:
            raise _wrong_kind(path, mode, is_folder=number < len(parts))


def is_regular(folder: Path, name: str) -> bool:
    """Whether `name` is there; raises `CorruptError` if it is not a regular file."""
    try:
        check_regular(folder, name)
    except FileNotFoundError:
        return False
    return (folder / name).is_file() if is_remote(folder) else True


def check_folders(folder: Path, names: tuple[str, ...]) -> None:
    """Raise `CorruptError` if one of `names` exists in `folder` and is not a real folder."""
    if is_remote(folder):
        return
    for name in names:
        try:
            mode = os.lstat(folder / name).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            raise _wrong_kind(str(folder / name), mode, is_folder=True)


def confined_path(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`, to write it: existing folders on the way are real ones.

    The last part may be anything that a rename replaces; a folder raises `CorruptError`.
    """
    parts = check_name(folder, name).parts
    path = folder / name
    if is_remote(folder):
        return path
    current = os.fspath(folder)
    for number, part in enumerate(parts, 1):
        current = f"{current}/{part}"
        try:
            mode = _mode_of(current)
        except FileNotFoundError:
            break
        if stat.S_ISDIR(mode) != (number < len(parts)):
            raise _wrong_kind(current, mode, is_folder=number < len(parts))
    return path


def open_regular(folder: Path, name: str) -> int:
    """Descriptor of the regular file `name` below `folder`, on disk, opened for reading.

    No link is followed below `folder`, and a FIFO or device is never waited for. Raises
    `CorruptError` for any other kind of file, `FileNotFoundError`, or another `OSError`.
    """
    parts = check_name(folder, name).parts
    current = _open_folder(folder)
    try:
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            try:
                flags = _FILE_FLAGS if is_last else _FOLDER_FLAGS
                opened = os.open(part, flags, dir_fd=current)
            except OSError as error:
                where = "/".join((os.fspath(folder), *parts[:number]))
                if error.errno in (*_NO_FOLLOW, errno.ENXIO):
                    raise _wrong_kind(where, os.lstat(where).st_mode, not is_last) from None
                error.filename = where
                raise
            os.close(current)
            current = opened
        mode = os.fstat(current).st_mode
        if not stat.S_ISREG(mode):
            raise _wrong_kind(str(folder / name), mode, is_folder=False)
    except BaseException:
        os.close(current)
        raise
    return current


def open_confined(folder: Path, name: str) -> BufferedReader:
    """Open the file `name` below `folder` for reading; an object of a store as it is.

    Raises as `open_regular`.
    """
    if is_remote(folder):
        check_name(folder, name)
        return (folder / name).open("rb")  # pyright: ignore[reportReturnType]
    return os.fdopen(open_regular(folder, name), "rb")


def read_confined(folder: Path, name: str, most: int | None = None) -> bytes:
    """The bytes of the file `name` below `folder`; raises as `open_regular`.

    Raises `CorruptError`, too, for a file of more than `most` bytes, before any is read.
    """
    check_name(folder, name)
    if is_remote(folder):
        return read_object(folder / name, most)
    with translate_read_errors(folder / name):
        return _read_regular(folder, name, most)


def _read_regular(folder: Path, name: str, most: int | None) -> bytes:
    """The bytes of a regular file on disk, see `read_confined`."""
    descriptor = open_regular(folder, name)
    try:
        size = os.fstat(descriptor).st_size
        if most is not None and size > most:
            raise CorruptError(f"{folder / name} has {size} bytes; such a file has at most {most}")
        blocks = []
        while block := os.read(descriptor, max(size, 1) + 1):
            blocks.append(block)
        return b"".join(blocks)
    except OSError as error:
        error.filename = str(folder / name)
        raise
    finally:
        os.close(descriptor)


def read_confined_json(folder: Path, name: str) -> dict[str, Any]:
    """Read the file `name` of `write_json` below `folder`, without the digest.

    Raises `NotFoundError` for a missing file, `CorruptError` for a changed one or no regular file.
    """
    path = folder / name
    try:
        return parse_json(read_confined(folder, name, MAX_JSON_BYTES), path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None


def confined_digest(folder: Path, name: str) -> str:
    """Hex sha256 of the file `name` below `folder`; raises as `open_regular`."""
    check_name(folder, name)
    with translate_read_errors(folder / name), open_confined(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_confined(folder: Path, name: str) -> None:
    """Remove the file `name`, or the folder with all in it, below `folder` on a disk.

    No link is followed on the way; a link under the name itself is removed. Nothing there is no
    error.
    """
    parts = check_name(folder, name).parts
    current = _open_folder(folder)
    try:
        for part in parts[:-1]:
            opened = os.open(part, _FOLDER_FLAGS, dir_fd=current)
            os.close(current)
            current = opened
        try:
            if stat.S_ISDIR(os.lstat(parts[-1], dir_fd=current).st_mode):
                shutil.rmtree(parts[-1], dir_fd=current)
            else:
                os.unlink(parts[-1], dir_fd=current)
        except FileNotFoundError:
            return
    except (FileNotFoundError, NotADirectoryError):
        return
    finally:
        os.close(current)


def _open_folder(folder: Path) -> int:
    """Descriptor of the folder itself, which may be a link."""
    return os.open(folder, _FOLDER_FLAGS & ~os.O_NOFOLLOW)


def _mode_of(path: str) -> int:
    """Kind of a file; a file on the way, where a folder should be, counts as wrong kind."""
    try:
        return os.lstat(path).st_mode
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None


def _wrong_kind(path: str, mode: int, is_folder: bool) -> CorruptError:
    """The error for a file of another kind than a cache has at `path`."""
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    kind = next((text for test, text in kinds if test(mode)), "a device")
    expected = "a folder" if is_folder else "a regular file"
    return CorruptError(
        f"{path} is {kind}, where a cache has {expected}; nothing is read or written through it: "
        "remove it, then see `residua verify`"
    )
