"""The files of the dashboard, read once: no request names a path of the disk.

`static/index.html` is the page, `app.js` chooses its views; `vendor/` holds uPlot with its licence.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
"""End of a name -> media type; files of other names are not served."""


@dataclass(frozen=True)
class StaticFile:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str
    """Strong ETag with its quotes: a digest of the content."""


@cache
def read_static_files() -> dict[str, StaticFile]:
    """Name below `static/`, such as `vendor/uPlot.esm.js` -> file, of all files of the page."""
    found: dict[str, StaticFile] = {}
    _read_folder(files(__package__ or __name__) / "static", "", found)
    return found


def _read_folder(folder: Traversable, prefix: str, found: dict[str, StaticFile]) -> None:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            _read_folder(entry, f"{name}/", found)
        elif (media_type := MEDIA_TYPES.get(name.rpartition(".")[2])) is not None:
            content = entry.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:32]
            found[name] = StaticFile(content, media_type, f'"{digest}"')
