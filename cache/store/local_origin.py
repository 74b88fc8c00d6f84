"""Where model and data of a cache are on this machine: kept beside the cache, never shared."""

from pathlib import Path, PurePath

from ..errors import ResiduaError
from ..files.json_files import read_json, write_json

FILE = "local.json"
"""Not among the files that the journal names, so that `push` and `export` leave it out."""


def public_name(name: str) -> str:
    """A hub id as it is; of a path, the last part: folders at home concern nobody."""
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve().name
    local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return PurePath(name).name if local else name


def write_origin(cache: Path, model: str, data: str) -> None:
    """Note what the user named, as absolute paths where they are files or folders here."""
    write_json(cache / FILE, {"model": _absolute(model), "data": _absolute(data)})


def read_origin(cache: Path) -> dict[str, str]:
    """`model` and `data` as they were named; empty in a cache that came from elsewhere."""
    try:
        value = read_json(cache / FILE)
    except (ResiduaError, OSError):
        return {}
    return {name: str(value[name]) for name in ("model", "data") if name in value}


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
