"""Digests of weight files and of their tensors, remembered, so that nobody hashes gigabytes twice.

One small JSON file in the user's cache folder, outside every root. A file is believed unchanged
while its path, size, times and inode are; anything odd about the memo itself means hashing.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ModelError, ResiduaError
from ..files.json_files import file_digest, read_json, write_json
from .safetensors_header import read_header

SMALLEST = 4 << 20
"""Files of fewer bytes are hashed every time: that takes less than remembering."""
SETTLED_SECONDS = 2.0
"""A file changed later than this before it was hashed is not remembered: its time stamp may be too
coarse to tell the next change."""
ENTRIES = {"files": 1000, "tensors": 200}
"""Files that are remembered, by what is remembered of them."""
BLOCK_BYTES = 8 << 20


def memo_path() -> Path:
    """Where digests are remembered: `residua-digests/` beside the default root, never in it."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "residua-digests" / "digests.json"


def remembered_file_digests(files: Iterable[Path]) -> dict[str, str]:
    """Name -> hex sha256 of each of `files`; those that did not change are not read."""
    return {path.name: found for path, found in _remembered("files", files, file_digest).items()}


def remembered_tensor_digests(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Each of the safetensors `files` -> tensor -> its digest, see `tensor_digests`."""
    return _remembered("tensors", files, tensor_digests)


def tensor_digests(file: Path) -> dict[str, str]:
    """Tensor -> hex sha256 of its dtype and shape, as in the line `F32 4,3\\n`, and its bytes.

    `file` is of safetensors; raises `ModelError` if it is not, or is cut short.
    """
    digests = {}
    with open(file, "rb") as data:
        for name, (dtype, shape, (start, stop)) in read_header(file).items():
            digest = hashlib.sha256(f"{dtype} {','.join(map(str, shape))}\n".encode())
            data.seek(start)
            while start < stop:
                block = data.read(min(BLOCK_BYTES, stop - start))
                if not block:
                    raise ModelError(f"{file} ends within tensor {name!r}; download it again")
                digest.update(block)
                start += len(block)
            digests[name] = digest.hexdigest()
    return digests


def _remembered(
    kind: str, files: Iterable[Path], compute: Callable[[Path], Any]
) -> dict[Path, Any]:
    """File -> what `compute` gives of it, or gave before if the file did not change."""
    memo = _load(kind)
    results: dict[Path, Any] = {}
    news: dict[str, list[Any]] = {}
    for file in files:
        path, stamp = str(file.resolve()), _stamp(file)
        known = memo.get(path)
        if known is not None and known[:-1] == stamp:
            results[file] = known[-1]
            continue
        results[file] = compute(file)
        if _is_settled(stamp) and _stamp(file) == stamp:
            news[path] = [*stamp, results[file]]
    if news:
        _save(kind, news)
    return results


def _stamp(file: Path) -> list[int]:
    """What changes when the file does; the inode's own time cannot be set back."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_settled(stamp: list[int]) -> bool:
    age = time.time_ns() - max(stamp[1], stamp[2])
    return stamp[0] >= SMALLEST and age > SETTLED_SECONDS * 1e9


def _load(kind: str) -> dict[str, list[Any]]:
    """The memo of one kind; empty if there is none that can be trusted."""
    with suppress(ResiduaError, OSError):
        entries = read_json(memo_path()).get(kind)
        if isinstance(entries, dict) and all(_is_entry(kind, e) for e in entries.values()):
            return entries
    return {}


def _is_entry(kind: str, entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    if kind == "files":
        return isinstance(entry[-1], str)
    return isinstance(entry[-1], dict) and all(isinstance(d, str) for d in entry[-1].values())


def _save(kind: str, news: dict[str, list[Any]]) -> None:
    """Add to what is there by now; a folder that cannot be written costs only the memo."""
    path = memo_path()
    entries = {k: v for k, v in _load(kind).items() if k not in news}
    for name in list(entries)[: max(0, len(entries) + len(news) - ENTRIES[kind])]:
        del entries[name]
    kinds = {other: _load(other) for other in ENTRIES if other != kind}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {kind: entries | news, **kinds})
