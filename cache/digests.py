"""Digests of weight files, remembered, so that asking again does not hash gigabytes again.

One small JSON file in the user's cache folder, outside every root. A file is believed unchanged
while its path, size, times and inode are; anything odd about the memo itself means hashing.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import ResiduaError
from .jsonfile import file_digest, read_json, write_json

SMALLEST = 4 << 20
"""Files of fewer bytes are hashed every time: that takes less than remembering."""
SETTLED_SECONDS = 2.0
"""A file changed later than this before it was hashed is not remembered: its time stamp may be too
coarse to tell the next change."""
ENTRIES = 1000


def memo_path() -> Path:
    """Where digests are remembered: `residua-digests/` beside the default root, never in it."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "residua-digests" / "digests.json"


def known_digests(files: Iterable[Path]) -> dict[str, str]:
    """Name -> hex sha256 of each of `files`; those that did not change are not read."""
    memo = _load()
    found: dict[str, str] = {}
    news: dict[str, list[Any]] = {}
    for file in files:
        path, stamp = str(file.resolve()), _stamp(file)
        known = memo.get(path)
        if known is not None and known[:-1] == stamp:
            found[file.name] = known[-1]
            continue
        found[file.name] = file_digest(file)
        if _is_settled(stamp) and _stamp(file) == stamp:
            news[path] = [*stamp, found[file.name]]
    if news:
        _save(news)
    return found


def _stamp(file: Path) -> list[int]:
    """What changes when the file does; the inode's own time cannot be set back."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_settled(stamp: list[int]) -> bool:
    age = time.time_ns() - max(stamp[1], stamp[2])
    return stamp[0] >= SMALLEST and age > SETTLED_SECONDS * 1e9


def _load() -> dict[str, list[Any]]:
    """The memo; empty if there is none that can be trusted."""
    with suppress(ResiduaError, OSError):
        files = read_json(memo_path()).get("files")
        if isinstance(files, dict) and all(_is_entry(entry) for entry in files.values()):
            return files
    return {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[-1], str)


def _save(news: dict[str, list[Any]]) -> None:
    """Add to what is there by now; a folder that cannot be written costs only the memo."""
    path = memo_path()
    kept = {k: v for k, v in _load().items() if k not in news}
    for name in list(kept)[: max(0, len(kept) + len(news) - ENTRIES)]:
        del kept[name]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"files": kept | news})
