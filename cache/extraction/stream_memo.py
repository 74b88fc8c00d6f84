"""Summaries of token streams, kept so that the same texts are not tokenized twice for a look-up.

`answer.py` asks for the summary of a request's token stream before it reads any text. Summaries lie
in the user's cache folder beside the digests of weight files (`model/weight_digests.py`), one JSON
file per request. A summary counts while every file of the data has the size, time stamps and inode
of the time when it was read, and while the files of the tokenizer, the options and the code that
makes token streams are the same. A memo that is unreadable is made again.
"""

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..documents.data_files import STANDARD_INPUT, data_paths, is_pattern
from ..errors import ResiduaError
from ..files.json_files import json_digest, read_json, write_json
from ..model.source import ModelSource
from ..model.weight_digests import file_stamp, is_settled, memo_path
from ..tokens.stream_summary import StreamSummary
from .request import ExtractionRequest

MIN_BYTES = 64 << 10
"""Smaller data are tokenized every time, which takes less time than the memo."""
MAX_SEQUENCES = 8 << 20
"""Sequences up to which a summary is kept: 90 MB of JSON."""
MAX_MEMOS = 100
"""Largest number of kept summaries."""
MAX_MEMO_BYTES = 256 << 20
"""Most bytes of all kept summaries together; the oldest are deleted."""
MAX_FILES = 1000
"""Most files of a saved data set, a folder or a pattern whose summary is kept."""
STREAM_OPTIONS = (
    "data",
    "text_column",
    "separator",
    "split",
    "data_format",
    "bos",
    "generation_prompt",
    "context",
    "pack",
    "positions",
    "max_tokens",
    "seed",
    "trust_remote_code",
    "format",
)
"""Options of a request that decide the token stream, beside the model."""


def read_stream_memo(request: ExtractionRequest, source: ModelSource) -> StreamSummary | None:
    """The kept summary of the token stream of `request`; None if the texts must be read."""
    stamps = data_stamps(request.data)
    if stamps is None:
        return None
    with suppress(ResiduaError, OSError):
        memo = read_json(_memo_file(request, source))
        if memo.get("stamps") == stamps:
            return StreamSummary.from_dict(memo["summary"])
    return None


def write_stream_memo(
    request: ExtractionRequest,
    source: ModelSource,
    stamps: list[list[Any]] | None,
    summary: StreamSummary,
) -> None:
    """Keep `summary`, made of data with `stamps`; a read-only folder is not an error.

    Nothing is kept of small data, and of data that changed while they were read or a moment before.
    """
    if stamps is None or stamps != data_stamps(request.data):
        return
    total_bytes = sum(stamp[1] for stamp in stamps)
    if total_bytes < MIN_BYTES or summary.sequences > MAX_SEQUENCES:
        return
    if not all(is_settled(stamp[1:]) for stamp in stamps):
        return
    with suppress(ResiduaError, OSError):
        path = _memo_file(request, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"stamps": stamps, "summary": summary.to_dict()})
        _delete_oldest_memos(path.parent)


def data_stamps(data: str) -> list[list[Any]] | None:
    """Name, size, time stamps and inode of each file of the data, sorted by name.

    None for standard input and data of the hub, which have no files here, and for many files.
    """
    path = Path(data).expanduser()
    try:
        if data == STANDARD_INPUT:
            return None
        if path.is_file():
            return [[path.name, *file_stamp(path)]]
        if is_pattern(data):
            files = data_paths(data) or []
            names = [str(file) for file in files]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            names = [file.relative_to(path).as_posix() for file in files]
        else:
            return None
        if not files or len(files) > MAX_FILES:
            return None
        return [[name, *file_stamp(file)] for name, file in zip(names, files, strict=True)]
    except OSError:
        return None


def _memo_file(request: ExtractionRequest, source: ModelSource) -> Path:
    """File of the summary, named by the digest of all that decides the token stream but the texts.

    The files of the tokenizer include config.json, which gives the context and the separator.
    """
    path = Path(request.data).expanduser().absolute()
    key = {
        "options": {name: getattr(request, name) for name in STREAM_OPTIONS},
        "path": str(path),
        "tokenizer": source.tokenizer_files_digest,
        "code": _code_digest(),
        "versions": [np.__version__, version("datasets") if path.is_dir() else None],
    }
    return memo_path().parent / "streams" / f"{json_digest(key)}.json"


@cache
def _code_digest() -> str:
    """sha256 of the files of this package that read texts and make token streams of them."""
    digest = hashlib.sha256()
    for pattern in ("documents/*.py", "images/*.py", "tokens/*.py", "files/text_lines.py"):
        for file in sorted(Path(__file__).parents[1].glob(pattern)):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _delete_oldest_memos(folder: Path) -> None:
    """Delete the oldest summaries beyond `MAX_MEMOS` files and `MAX_MEMO_BYTES`."""
    entries = [(file.stat(), file) for file in folder.glob("*.json")]
    entries.sort(key=lambda entry: entry[0].st_mtime_ns, reverse=True)
    total_bytes = 0
    for number, (stat, file) in enumerate(entries):
        total_bytes += stat.st_size
        if number >= MAX_MEMOS or (number > 0 and total_bytes > MAX_MEMO_BYTES):
            file.unlink(missing_ok=True)
