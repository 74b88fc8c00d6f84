"""The origin of a cache: names of its model and data on this machine, in `local.json`.

Extraction writes the origin, so that `residua repair` and `info` find model and texts again. The
file is never shared: `push` and `export` leave it out, and cards have `public_name`s.
"""

from pathlib import Path, PurePath

from ..documents.data_files import STANDARD_INPUT, is_pattern
from ..errors import ResiduaError
from ..files.confined_files import read_confined_json
from ..files.json_files import write_json

FILE = "local.json"
"""Name of the file; the journal does not name it, so that `push` and `export` leave it out."""


def public_name(name: str) -> str:
    """Name to publish: a hub id unchanged, of a local path or pattern only the last part."""
    path = Path(name).expanduser()
    if name == STANDARD_INPUT:
        return "standard input"
    if is_pattern(name):
        return path.name
    if path.exists():
        return path.resolve().name
    is_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return PurePath(name).name if is_local else name


def write_origin(cache: Path, model: str, data: str) -> None:
    """Write the names that the user gave; existing files and folders as absolute paths."""
    write_json(cache / FILE, {"model": _absolute(model), "data": _absolute(data)})


def read_origin(cache: Path) -> dict[str, str]:
    """Keys `model` and `data` of the origin; empty for a cache from another machine."""
    try:
        origin = read_confined_json(cache, FILE)
    except (ResiduaError, OSError):
        return {}
    return {name: str(origin[name]) for name in ("model", "data") if name in origin}


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    if is_pattern(name):
        return str(path.absolute())
    return str(path.resolve()) if path.exists() else name
