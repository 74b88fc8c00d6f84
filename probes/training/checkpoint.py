"""Checkpoints of a running fit: one safetensors file and one JSON file, replaced atomically.

Tensors are written first, then the JSON file that names them with their digest. Tuned lenses
(`lens/fit_groups.py`) and vocabulary probes (`vocabulary/descent.py`) save their fits here.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ...cache.errors import CorruptError, MismatchError, NotFoundError
from ...cache.files.json_files import file_digest, make_folder, read_json, sync_folder, write_json


class Checkpoint:
    """Folder that holds the last state of one fit.

    `identity` describes data and parameters of the fit: a state with another identity is refused.
    `name` is the name of the JSON file.
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any], name: str = "fit.json"
    ) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self.file = self.folder / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder within the context; waits for a process that has locked it.

        A worker that lost its client works on for a while, perhaps at this very fit.
        """
        make_folder(self.folder)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the saved state by `state` (JSON, with a key `step`) and `tensors`.

        A process killed at any moment leaves the old state or the new state whole.
        """
        from safetensors.torch import save_file

        make_folder(self.folder)
        name = f"{state['step']:08d}.safetensors"
        temporary = self.folder / f".{name}.tmp"
        try:
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
        for tensor_file in self.folder.glob("*.safetensors"):
            if tensor_file.name != name:
                tensor_file.unlink()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The saved state and tensors, or None without any.

        Raises `MismatchError` for the state of another fit, `CorruptError` for a changed file.
        """
        from safetensors.torch import load_file

        try:
            saved = read_json(self.file)
        except NotFoundError:
            return None
        identity = saved["identity"]
        changed = [key for key in self.identity if self.identity[key] != identity.get(key)]
        if changed:
            differences = "; ".join(
                f"{key} was {identity.get(key)!r}, is {self.identity[key]!r}" for key in changed
            )
            raise MismatchError(
                f"the checkpoint in {self.folder} is of another fit: {differences}; name another "
                "folder or remove it"
            )
        file = self.folder / saved["tensors"]
        if not file.is_file() or file_digest(file) != saved["digest"]:
            raise CorruptError(f"{file} is missing or was changed; remove {self.folder}")
        # Copies: the last bit of a product depends on how its factors are aligned in memory.
        return saved["state"], {name: value.clone() for name, value in load_file(file).items()}

    def remove(self) -> None:
        """Remove the state of a finished fit, and the folder if nothing else is in it."""
        if not self.file.exists():
            return
        self.file.unlink()
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.tmp")]:
            file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
