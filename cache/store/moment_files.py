"""Checks the files of kept moments, `moments/<name>/`, against their own digests.

Moments are derived data, which neither journal nor id mention: damaged ones are removed and
computed again. `verify` names them, `repair` removes them; `probes/moments` reads and writes them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import CorruptError, ModelError, NotFoundError
from ..files.confined_files import check_folders, check_regular, open_confined, read_confined_json
from ..files.json_fields import FieldError, as_digest, object_field
from ..files.paths import is_remote, list_folder, store_of
from ..model.safetensors_header import read_header

FOLDER = "moments"
TABLE, TENSORS = "moments.json", "moments.safetensors"
"""Files of one folder of moments."""
BLOCK_BYTES = 1 << 22
"""Bytes that are hashed at a time."""


def damaged_moments(cache: Path) -> Iterator[tuple[str, str]]:
    """File and message of each damaged file of the moments kept with the cache at `cache`."""
    try:
        check_folders(cache, (FOLDER,))
    except CorruptError as error:
        yield FOLDER, str(error)
        return
    for path in sorted(list_folder(cache / FOLDER)):
        if path.name.startswith("."):
            continue
        name = f"{FOLDER}/{path.name}"
        try:
            if not is_remote(path) and path.is_file() and not path.is_symlink():
                continue  # not a folder of moments
            check_folders(path.parent, (path.name,))
            table = read_confined_json(cache, f"{name}/{TABLE}")
            digests = {
                tensor: as_digest(digest, tensor)
                for tensor, digest in object_field(table, "tensors").items()
            }
        except (CorruptError, NotFoundError, FieldError) as error:
            if path.exists() or path.is_symlink():  # else removed meanwhile
                yield f"{name}/{TABLE}", str(error)
            continue
        if message := _tensor_damage(cache, f"{name}/{TENSORS}", digests):
            yield f"{name}/{TENSORS}", message


def _tensor_damage(cache: Path, name: str, digests: dict[str, str]) -> str | None:
    """Why the file `name` does not hold the tensors of `digests`, name -> sha256; None if it does.

    Raises `OSError` for a file that the disk cannot read.
    """
    try:
        with _on_disk(cache, name) as (folder, local_name):
            check_regular(folder, local_name)
            header = read_header(folder / local_name)
            if header.keys() != digests.keys():
                return "the file does not hold the tensors that moments.json names"
            with open_confined(folder, local_name) as file:
                for tensor, entry in header.items():
                    if _digest_of_span(file, *entry.span) != digests[tensor]:
                        return f"tensor {tensor} is not what was written (sha256 differs)"
    except FileNotFoundError:
        return "the file is missing"
    except CorruptError as error:
        return str(error)
    except ModelError:
        return "the file is no whole file of tensors"
    return None


def _digest_of_span(file: Any, start: int, stop: int) -> str:
    """Hex sha256 of the bytes `start:stop` of an open file."""
    digest = hashlib.sha256()
    file.seek(start)
    while start < stop and (block := file.read(min(BLOCK_BYTES, stop - start))):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


@contextmanager
def _on_disk(cache: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The file `name` as folder and name on a disk: of an object store, a temporary copy."""
    if not is_remote(cache):
        yield cache, name
        return
    with TemporaryDirectory(prefix="residua-") as folder:
        store, key = store_of(cache / name)
        store.get_file(key, str(Path(folder) / TENSORS))
        yield Path(folder), TENSORS
