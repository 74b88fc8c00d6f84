"""The files of a saved probe as a whole: copied to another root, or removed."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from ...cache.errors import CorruptError, MismatchError, UsageError
from ...cache.files.paths import list_folder
from ...cache.files.read_errors import read_file
from ...cache.files.removal import remove_folder
from ...cache.format.manifest import SHORT_ID
from .config_file import read_config
from .library import FOLDER
from .save import FILES, write_probe


def copy_probe(
    path: Path, root: Path, *, name: str | None = None, expect: str | None = None
) -> tuple[Path, str]:
    """Copy the probe in the folder `path` under `root`; returns its folder there and the status.

    The folder's name there is `name`, by default that of `path`. The status is `copied`, or `hit`
    if `root` has the same probe. Raises `CorruptError` for changed bytes, and `MismatchError` if
    another probe has the name there, or if the probe was not fitted on a cache whose id begins with
    `expect`.
    """
    config, data = read_config(path / "config.json"), read_file(path / "probe.safetensors")
    if hashlib.sha256(data).hexdigest() != config["tensors"]:
        raise CorruptError(f"{path} was changed after it was written; fit it again")
    if expect is not None and not config["cache"].startswith(expect):
        raise MismatchError(
            f"this probe was fitted on cache {config['cache'][:SHORT_ID]}, not {expect[:SHORT_ID]}"
        )
    target = root / FOLDER / (name or path.name)
    if (target / "config.json").is_file():
        if read_config(target / "config.json") != config:
            raise MismatchError(
                f"{target} holds another probe; remove it (residua rm), or name another root"
            )
        return target, "hit"
    write_probe(target, data, config)
    return target, "copied"


def _allow(folder: Path) -> None:
    """Object to no removal."""


def remove_probe(path: Path, check: Callable[[Path], None] = _allow) -> None:
    """Remove the probe in the folder `path`; raises `UsageError` if it holds other files.

    `check` is that of `remove_folder`.
    """
    others = sorted({entry.name for entry in list_folder(path)} - set(FILES))
    if others:
        raise UsageError(
            f"{path} holds more than a probe ({', '.join(others[:5])}): remove the folder by hand"
        )
    remove_folder(path, "config.json", check)
