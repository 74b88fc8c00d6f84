"""Folders of checkpoints of unfinished fits: whether a fit works in one, and their removal.

A folder holds the lock, states and tensors of a fit, and perhaps a folder for each of its groups
(`probes/training/checkpoint.py`). Files of others in it stay.
"""

import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path

from ...cache.errors import InUseError
from ...cache.files.leases import is_file_of, try_lock
from ...probes.training.checkpoint import LOCK

STATE_FILE = re.compile(r"[\w.-]+\.json|[0-9]{8}\.safetensors|\.[\w.-]+\.tmp|" + re.escape(LOCK))
"""Names of the files that a fit writes into a folder of checkpoints."""
DEPTH = 2
"""Levels of folders that the checkpoints of one fit have."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a real folder holds files of a fit, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    entries = _entries(folder)
    return bool(entries) and all(
        is_checkpoint(entry) if entry.is_dir() else bool(STATE_FILE.fullmatch(entry.name))
        for entry in entries
    )


def is_fit_running(folder: Path) -> bool:
    """Whether a process works at the fit whose checkpoints are in `folder`."""
    try:
        with ExitStack() as stack:
            lock_fit(stack, folder)
    except InUseError:
        return True
    return False


def lock_fit(stack: ExitStack, folder: Path) -> None:
    """Lock the fit in `folder`, with its groups, until `stack` is closed; makes no file.

    Raises `InUseError` while a process works at it.
    """
    for file in _lock_files(folder, DEPTH):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone, or not ours
            continue
        stack.callback(os.close, descriptor)
        if try_lock(descriptor) is False or not is_file_of(descriptor, file):
            raise InUseError(f"a fit works in {folder}; wait for its end, or stop it")


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoints in `folder`; raises `InUseError` while a process works at the fit.

    A fit that waits for the lock meanwhile makes a new folder. Files of others stay, with their
    folders.
    """
    with ExitStack() as stack:
        lock_fit(stack, folder)
        _remove_states(folder, DEPTH)


def _remove_states(folder: Path, depth: int) -> None:
    """Remove the files of a fit in `folder` and below, locks last, and folders that are empty."""
    for entry in sorted(_entries(folder), key=lambda entry: entry.name == LOCK):
        if entry.is_dir() and not entry.is_symlink():
            if depth > 1:
                _remove_states(entry, depth - 1)
        elif STATE_FILE.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    with suppress(OSError):  # holds other files
        folder.rmdir()


def _lock_files(folder: Path, depth: int) -> list[Path]:
    """Lock files in `folder` and the folders in it."""
    files = [folder / LOCK]
    for entry in _entries(folder) if depth > 1 else ():
        if entry.is_dir() and not entry.is_symlink():
            files += _lock_files(entry, depth - 1)
    return files


def _entries(folder: Path) -> list[Path]:
    """Files and folders in `folder`; none if it is gone or cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
