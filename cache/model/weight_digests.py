"""sha256 digests of weight files and of their tensors, kept so that no file is hashed twice.

`ModelSource.identity` (`source.py`) asks for them. They are kept in one JSON file, the *memo*, in
the user's cache folder, outside every root of caches. A file counts as unchanged while path, size,
time stamps and inode are the same. If the memo is unreadable, files are hashed again.
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

MIN_BYTES = 4 << 20
"""Smaller files are hashed every time, which takes less time than the memo."""
SETTLED_SECONDS = 2.0
"""Age below which a file's digest is not kept: its time stamp may be too coarse to show the next
change."""
MAX_ENTRIES = {"files": 1000, "tensors": 200}
"""Largest number of files in the memo, by kind of digest."""
BLOCK_BYTES = 8 << 20
"""Bytes per read."""


def memo_path() -> Path:
    """Path of the memo: `residua-digests/` beside the default root, never inside a root."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "residua-digests" / "digests.json"


def remembered_file_digests(files: Iterable[Path]) -> dict[str, str]:
    """File name -> hex sha256 of each of `files`; unchanged files are not read."""
    digests = _digests_with_memo("files", files, file_digest)
    return {path.name: digest for path, digest in digests.items()}


def remembered_tensor_digests(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Safetensors file -> its `tensor_digests`; unchanged files are not read."""
    return _digests_with_memo("tensors", files, tensor_digests)


def tensor_digests(file: Path) -> dict[str, str]:
    """Tensor name -> hex sha256 of a line of dtype and shape (`F32 4,3\\n`) and the tensor's bytes.

    Raises `ModelError` if `file` is no safetensors file or is cut short.
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


def _digests_with_memo(
    kind: str, files: Iterable[Path], compute: Callable[[Path], Any]
) -> dict[Path, Any]:
    """File -> digest of `kind`: from the memo if the file is unchanged, else by `compute`."""
    memo = _read_memo(kind)
    digests: dict[Path, Any] = {}
    new_entries: dict[str, list[Any]] = {}
    for file in files:
        path, stamp = str(file.resolve()), file_stamp(file)
        entry = memo.get(path)
        if entry is not None and entry[:-1] == stamp:
            digests[file] = entry[-1]
            continue
        digests[file] = compute(file)
        # The digest is kept unless the file changed meanwhile or a moment ago.
        if stamp[0] >= MIN_BYTES and is_settled(stamp) and file_stamp(file) == stamp:
            new_entries[path] = [*stamp, digests[file]]
    if new_entries:
        _add_to_memo(kind, new_entries)
    return digests


def file_stamp(file: Path) -> list[int]:
    """Size, time stamps and inode of a file; ctime cannot be set back by programs."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def is_settled(stamp: list[int]) -> bool:
    """Return whether a file was old enough at its `file_stamp` to show the next change."""
    return time.time_ns() - max(stamp[1], stamp[2]) > SETTLED_SECONDS * 1e9


def _read_memo(kind: str) -> dict[str, list[Any]]:
    """Path -> [*stamp, digest] for a kind of digest; empty if the memo is absent or damaged."""
    with suppress(ResiduaError, OSError):
        entries = read_json(memo_path()).get(kind)
        if isinstance(entries, dict) and all(
            _is_valid_entry(kind, entry) for entry in entries.values()
        ):
            return entries
    return {}


def _is_valid_entry(kind: str, entry: Any) -> bool:
    """Return whether an entry of the memo has the types of [*stamp, digest]."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    if kind == "files":
        return isinstance(entry[-1], str)
    return isinstance(entry[-1], dict) and all(isinstance(d, str) for d in entry[-1].values())


def _add_to_memo(kind: str, new_entries: dict[str, list[Any]]) -> None:
    """Add entries to the memo and drop the oldest; a read-only folder is not an error."""
    path = memo_path()
    # The memo is read again: other processes may have added entries meanwhile.
    entries = {file: entry for file, entry in _read_memo(kind).items() if file not in new_entries}
    for file in list(entries)[: max(0, len(entries) + len(new_entries) - MAX_ENTRIES[kind])]:
        del entries[file]
    other_kinds = {name: _read_memo(name) for name in MAX_ENTRIES if name != kind}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {kind: entries | new_entries, **other_kinds})
