"""Checkpoints of a running fit: tensors first, then a JSON file that names them, atomically."""

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
    """A folder that holds the last state of one fit; `identity` says of which.

    `name` is that of the JSON file.
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any], name: str = "fit.json"
    ) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self.file = self.folder / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody else work here within the context; waits for who does.

        A worker that lost its client goes on for a while, and may still be at this very fit.
        """
        make_folder(self.folder)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the state; one killed at any moment leaves the old one or the new one whole."""
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
        about = {"identity": self.identity, "state": state, "tensors": name, "digest": digest}
        write_json(self.file, about)
        for old in self.folder.glob("*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The last state, None if there is none; raises `MismatchError` if it is of another fit."""
        from safetensors.torch import load_file

        try:
            found = read_json(self.file)
        except NotFoundError:
            return None
        other = [k for k in self.identity if self.identity[k] != found["identity"].get(k)]
        if other:
            differ = "; ".join(
                f"{k} was {found['identity'].get(k)!r}, is {self.identity[k]!r}" for k in other
            )
            raise MismatchError(
                f"the checkpoint in {self.folder} is of another fit: {differ}; name another folder "
                "or remove it"
            )
        file = self.folder / found["tensors"]
        if not file.is_file() or file_digest(file) != found["digest"]:
            raise CorruptError(f"{file} is missing or was changed; remove {self.folder}")
        # Copies: the last bit of a product depends on how its factors are aligned in memory.
        return found["state"], {name: value.clone() for name, value in load_file(file).items()}

    def remove(self) -> None:
        """Drop the state of a fit that is finished."""
        if not self.file.exists():
            return
        self.file.unlink()
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.tmp")]:
            file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
