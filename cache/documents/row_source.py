"""A file of rows, before it is read, and what its readers note of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError
from .text_lines import COMPRESSIONS

Row = dict[str, Any]
"""Column -> value."""


@dataclass
class RowFile:
    """A file of rows; reading it twice gives the same rows."""

    path: Path
    format: str
    """`json`, `csv`, `tsv` or `parquet`."""
    separator: str | None = None
    """Separator of the columns of .csv and .tsv that was asked for."""
    scratch: Path | None = None
    """Folder of temporary files."""
    notes: list[str] = field(default_factory=list)
    """What was decided while reading, for people."""

    @property
    def ending(self) -> str:
        """The ending of the name in lower case, without that of a compression."""
        return file_ending(self.path)

    def fail(self, place: str, reason: str) -> NoReturn:
        """Raise the error of a place that cannot be read, like `line 3`."""
        raise DataError(f"{self.path} cannot be read as {self.format}: {place}: {reason}") from None


def file_ending(path: Path) -> str:
    """The ending of a name in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((s for s in reversed(suffixes) if s not in COMPRESSIONS), "")
