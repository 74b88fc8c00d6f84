"""Checkpoints of a running fit: one safetensors file and one JSON file, replaced atomically.

Tensors are written first, then the JSON file that names them with their digest. Tuned lenses
(`lens/fit_groups.py`), vocabulary probes (`vocabulary/descent.py`) and causal bases
(`basis/layer_fit.py`) save their fits here. A fit works within `lock_folder` of its folder.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import CorruptError, MismatchError, NotFoundError, ResiduaError
from ...cache.files.confined_files import is_confined_name
from ...cache.files.disk_errors import system_error
from ...cache.files.json_fields import checking_fields, digest_field, object_field, text_field
from ...cache.files.json_files import file_digest, make_folder, read_json, sync_folder, write_json
from ...cache.files.leases import try_lock, wait_for_lock

if TYPE_CHECKING:
    from torch import Tensor

LOCK = "fit.lock"
"""File in a folder of checkpoints that the process which works there has locked."""


class Checkpoint:
    """Folder that holds the last state of one fit.

    `identity` describes data and parameters of the fit: a state with another identity is refused.
    `name` is the name of the JSON file.
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any], name: str = "fit.json"
    ) -> None:
        self.folder: Path = Path(folder)
        self.identity = identity
        self.file: Path = self.folder / name

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder within the context, as `lock_folder`."""
        return lock_folder(self.folder)

    def save(self, state: dict[str, Any], tensors: dict[str, "Tensor"]) -> None:
        """Replace the saved state by `state` (JSON, with a key `step`) and `tensors`.

        A process killed at any moment leaves the old state or the new state whole. Raises
        `NoSpaceError`, `LimitError` or `UsageError` if the disk or a limit stops the writing.
        """
        try:
            self._save(state, tensors)
        except Exception as error:
            with suppress(OSError):  # holds the state before, or the lock of the fit
                self.folder.rmdir()
            if isinstance(error, ResiduaError) or (reason := system_error(error)) is None:
                raise
            raise type(reason)(
                f"the fit cannot keep its state in {self.folder}: {reason} (--checkpoint names "
                "another place)"
            ) from error

    def _save(self, state: dict[str, Any], tensors: dict[str, "Tensor"]) -> None:
        from safetensors.torch import save_file

        make_folder(self.folder)
        name = f"{state['step']:08d}.safetensors"
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
            sync_folder(temporary)
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        digest = file_digest(self.folder / name)
        # From here on the JSON file names the new tensors; the old ones can go.
        saved = {"identity": self.identity, "state": state, "tensors": name, "digest": digest}
        write_json(self.file, saved)
        for other in (*self.folder.glob("*.safetensors"), *self.folder.glob(".*.tmp")):
            if other.name != name:
                other.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Any], dict[str, "Tensor"]] | None:
        """The saved state and tensors, or None without any.

        Raises `MismatchError` for the state of another fit, `CorruptError` for a changed file.
        """
        from safetensors.torch import load_file

        try:
            saved = read_json(self.file)
        except NotFoundError:
            return None
        with checking_fields(self.file, "the state of a fit"):
            identity, state = object_field(saved, "identity"), object_field(saved, "state")
            name, digest = text_field(saved, "tensors"), digest_field(saved, "digest")
        changed = [key for key in self.identity if self.identity[key] != identity.get(key)]
        if changed:
            differences = "; ".join(
                f"{key} was {identity.get(key)!r}, is {self.identity[key]!r}" for key in changed
            )
            raise MismatchError(
                f"the checkpoint in {self.folder} is of another fit: {differences}; name another "
                "folder or remove it"
            )
        file = self.folder / name
        is_there = is_confined_name(name) and file.is_file()
        if not is_there or file_digest(file) != digest:
            raise CorruptError(f"{file} is missing or was changed; remove {self.folder}")
        # Copies: the last bit of a product depends on how its factors are aligned in memory.
        return state, {name: value.clone() for name, value in load_file(file).items()}

    def remove(self) -> None:
        """Remove the state of a finished fit, and the folder if nothing else is in it.

        A folder that a process has locked is left to that process, which removes it at the end.
        """
        if not self.file.exists():
            return
        temporary = self.folder.glob(".*.tmp")
        for file in (self.file, *self.folder.glob("*.safetensors"), *temporary):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or locked
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if try_lock(descriptor) is not False:
                    _remove_if_empty(self.folder)
            finally:
                os.close(descriptor)


@contextmanager
def lock_folder(folder: Path | None) -> Iterator[None]:
    """Lock a folder of checkpoints within the context; waits for a process that has locked it.

    A worker that lost its client works on for a while, perhaps at this very fit. The folder is
    made, and removed at the end if no checkpoint is left in it. Does nothing without a folder.
    """
    if folder is None:
        yield
        return
    # Folders that this context makes, the innermost first.
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with wait_for_lock(folder / LOCK):
        try:
            yield
        finally:
            with suppress(OSError):  # not empty, or removed
                _remove_if_empty(folder)
                for path in missing[1:]:
                    path.rmdir()


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder of checkpoints, locked by this process, if nothing else is in the folder.

    Raises `OSError` for a folder that holds more.
    """
    if all(path.name == LOCK for path in folder.iterdir()):
        (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()
