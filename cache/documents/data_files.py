"""The files that hold the texts: one file, a pattern, a folder of shards, or standard input.

`load_documents` calls `open_data_files`. Several files are read as one: their documents are
numbered in the order of the files' paths.
"""

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..errors import DataError
from ..files.disk_errors import translate_disk_errors
from ..files.staging import staging_folder, sweep_staging
from ..files.text_lines import BLOCK_BYTES, open_bytes
from .row_files import ROW_FORMATS
from .row_source import file_ending

FILE_FORMATS = {".txt": "text", **ROW_FORMATS}
"""File ending -> format."""
DATA_FORMATS = tuple(ending[1:] for ending in FILE_FORMATS)
"""Names of formats for data whose name has no ending, such as standard input."""
STANDARD_INPUT = "-"
"""Name of the data that are read from standard input."""
LFS_POINTER = b"version https://git-lfs"
"""Beginning of the small file that git keeps in place of a large one."""
COPY_PREFIX = ".residua-input-"
"""Beginning of the names of folders that hold a copy of standard input."""
SAVED_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Files in a folder that `datasets` saved."""


@dataclass(frozen=True)
class DataFiles:
    """Files of one format, in the order in which they are read."""

    name: str
    """The data in messages: what the user gave."""
    paths: tuple[Path, ...]
    ending: str
    """Ending that gives the format, such as `.jsonl`."""
    notes: tuple[str, ...] = field(default=())
    """Files that are left out and guesses, as sentences for the user."""
    label: str | None = None
    """What a file that the user does not know is called in messages."""

    @property
    def format(self) -> str:
        """`text`, `json`, `csv`, `tsv` or `parquet`."""
        return FILE_FORMATS[self.ending]


def is_pattern(data: str) -> bool:
    """Return whether `data` is a pattern like `data/*.jsonl`, and not a file of that name."""
    return glob.has_magic(data) and not os.path.lexists(Path(data).expanduser())


def data_paths(data: str) -> list[Path] | None:
    """Files that a pattern or a folder of shards names, sorted; None for other data.

    Of a folder, files in subfolders count too, except those with a name, or in a folder with a
    name, that begins with a dot or an underscore. A folder that `datasets` saved is no folder of
    shards, nor is one without a file of a known ending.
    """
    if is_pattern(data):
        matches = glob.iglob(str(Path(data).expanduser()), recursive=True)
        return sorted(path for path in map(Path, matches) if path.is_file())
    folder = Path(data).expanduser()
    if not folder.is_dir() or any((folder / name).exists() for name in SAVED_MARKS):
        return None
    paths = sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        and file_ending(path) in FILE_FORMATS
        and path.is_file()
    )
    return paths or None


@contextmanager
def open_data_files(
    data: str, data_format: str | None = None, scratch: Path | None = None
) -> Iterator[DataFiles | None]:
    """Give the files of `data`, checked; None if `data` is a saved data set or a hub id.

    `data_format`, one of `DATA_FORMATS`, replaces the files' endings. Standard input is copied to
    a temporary file in the folder `scratch`, which is deleted at the end of the block. Raises
    `DataError` for empty files, files of several formats, and placeholders of git-lfs.
    """
    if data == STANDARD_INPUT:
        with _copied_standard_input(data_format, scratch) as files:
            yield files
        return
    path = Path(data).expanduser()
    if path.is_file():
        files = _checked_files(data, [path], data_format)
    else:
        paths = data_paths(data)
        if paths is not None and not paths:
            raise DataError(
                f"no file matches {data}; give a pattern like 'data/*.jsonl', in quotes so that "
                "the shell leaves it alone"
            )
        files = None if paths is None else _checked_files(data, paths, data_format)
    if files is None and data_format is not None and path.exists():
        raise DataError(f"--data-format is for files, not for {data}")
    yield files


def _checked_files(data: str, paths: Sequence[Path], data_format: str | None) -> DataFiles:
    """The files of `data`, which are not empty and have one format."""
    endings = {path: f".{data_format}" if data_format else file_ending(path) for path in paths}
    for path, ending in endings.items():
        if ending not in FILE_FORMATS:
            known = ", ".join(FILE_FORMATS)
            raise DataError(
                f"{path.name} has no known ending; expected one of {known} (or .gz of one), or "
                "say its format with --data-format"
            )

    # Several files: empty ones are left out, and the others must be of one format.
    notes: list[str] = []
    if len(paths) > 1:
        present = [path for path in paths if path.stat().st_size]
        if len(present) < len(paths):
            notes.append(f"{len(paths) - len(present)} empty files are left out")
        paths = present
        formats = {FILE_FORMATS[endings[path]]: path for path in reversed(paths)}
        if len(formats) > 1:
            examples = ", ".join(sorted(path.name for path in formats.values()))
            raise DataError(
                f"{data} has files of several formats ({examples}); choose those of one format "
                "with a pattern in quotes, like 'folder/*.jsonl'"
            )
    for path in paths:
        _check_content(path)
    if not paths:
        raise DataError(f"all files of {data} are empty; give files with texts")
    return DataFiles(data, tuple(paths), endings[paths[0]], tuple(notes))


def _check_content(path: Path) -> None:
    """Raise `DataError` for an empty file, and for a placeholder of git-lfs."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; give a file with texts")
    with open_bytes(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(
                f"{path} is a git-lfs pointer, not the texts; fetch them with 'git lfs pull', or "
                "download the file again"
            )


@contextmanager
def _copied_standard_input(data_format: str | None, scratch: Path | None) -> Iterator[DataFiles]:
    """Give a temporary copy of standard input, which cannot be read twice.

    Without `data_format` the input is .jsonl if it begins with `{`, else .txt.
    """
    source = getattr(sys.stdin, "buffer", None)
    if source is None or source.closed or source.isatty():
        raise DataError(
            "standard input is no pipe or file; pipe texts into the command, or give a file "
            f"instead of {STANDARD_INPUT}"
        )
    folder = Path(tempfile.gettempdir()) if scratch is None else scratch
    sweep_staging(folder, f"{COPY_PREFIX}*")  # of processes that were killed
    with staging_folder(folder, COPY_PREFIX, mode=0o700) as copy_folder:
        copy = copy_folder / "standard input"
        with translate_disk_errors(folder), copy.open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
        if not copy.stat().st_size:
            raise DataError(
                "standard input is empty (it can be read only once); pipe texts into the command"
            )
        notes: list[str] = []
        if data_format is None:
            with copy.open("rb") as file:
                is_rows = _first_character(file) == b"{"
            data_format = "jsonl" if is_rows else "txt"
            begins = "begins" if is_rows else "does not begin"
            notes.append(
                f"standard input is read as .{data_format}: it {begins} with {{ (--data-format)"
            )
        name = "standard input"
        yield DataFiles(name, (copy,), f".{data_format}", tuple(notes), label=name)


def _first_character(file: IO[bytes]) -> bytes:
    """The first byte that is no white space and no part of a byte order mark."""
    while block := file.read(BLOCK_BYTES):
        if block := block.removeprefix(b"\xef\xbb\xbf").lstrip():
            return block[:1]
    return b""
