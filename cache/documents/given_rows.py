"""Texts that a caller holds in Python, written to a temporary file that is read like any other.

`hold_texts` takes strings, dictionaries or a data set of the `datasets` library. An iterable is
read once, row by row; texts are read more than once, so its rows go to a temporary .jsonl file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import DataError
from ..files.disk_errors import translate_disk_errors


@dataclass(frozen=True)
class GivenTexts:
    """Texts that were given in Python: a temporary file of rows, or a data set in memory."""

    name: str
    """What they are, for messages and the cache's `data_name`: `120 texts given in Python`."""
    path: Path | None = None
    """The temporary .jsonl file."""
    dataset: Any = None
    """A `datasets.Dataset` or `DatasetDict`."""


@contextmanager
def hold_texts(data: Any, scratch: Path | None) -> Iterator[GivenTexts]:
    """Context with the texts of `data`, an iterable of texts and rows, or a data set.

    Temporary files lie in the folder `scratch` (None: the system's). Raises `DataError` for
    anything else, and for a row that is neither a text nor a dictionary.
    """
    if type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "save_to_disk"):
        yield GivenTexts(_dataset_name(data), dataset=data)
        return
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a data frame
        data = data.to_dict("records")
    if isinstance(data, Mapping | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"texts cannot be a {type(data).__name__}; give a path, a hub id, a list of texts, an "
            "iterable of dictionaries (one per row), or a datasets.Dataset"
        )
    with translate_disk_errors(scratch or Path.home()):
        folder = TemporaryDirectory(prefix=".residua-texts-", dir=scratch)
    with folder as name:
        path = Path(name) / "texts.jsonl"
        with translate_disk_errors(path), open(path, "w", encoding="utf-8") as file:
            count, are_texts = 0, True
            for count, row in enumerate(data, 1):
                are_texts &= isinstance(row, str) or row is None
                file.write(_as_json(row, count - 1) + "\n")
        kind = "texts" if are_texts else "rows"
        yield GivenTexts(f"{count} {kind} given in Python", path)


def _dataset_name(data: Any) -> str:
    """Name of a data set of `datasets`: that of its builder, or its kind."""
    info = getattr(data, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return str(name or f"{type(data).__name__} given in Python")


def _as_json(row: Any, number: int) -> str:
    """The JSON object of a row; a text is the column `text`."""
    if row is None or isinstance(row, str):
        row = {"text": None if row is None else str(row)}
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {number} of the texts is a {type(row).__name__}; expected a text or a dictionary "
            "of column and value"
        )
    try:
        return json.dumps({str(column): value for column, value in row.items()}, default=_plain)
    except (TypeError, ValueError) as error:
        raise DataError(f"row {number} of the texts cannot be read: {error}") from None


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers and arrays as Python's; bytes as text; other values as text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("its bytes are no UTF-8 text; decode them first") from None
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)
