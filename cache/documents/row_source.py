"""`RowFile`: path, format and options of a file of rows, and the notes of its reader.

Made by `load_documents`, read by the readers of `row_files.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError
from ..files.text_lines import COMPRESSIONS

Row = dict[str, Any]
"""One row: column -> value."""


@dataclass
class RowFile:
    """A file of rows, with the options for reading; may be read several times."""

    path: Path
    format: str
    """`json`, `csv`, `tsv` or `parquet`."""
    separator: str | None = None
    """Separator of the columns of .csv and .tsv files; None for the default of the format."""
    scratch: Path | None = None
    """Folder of temporary files; None for the system's."""
    name: str | None = None
    """What the rows are called in messages; None for the path."""
    notes: list[str] = field(default_factory=list)
    """Decisions taken while reading, as sentences for the user."""
    ending: str = ""
    """Ending that gives the format, such as `.jsonl`; by default that of `path`."""

    def __post_init__(self) -> None:
        self.ending = self.ending or file_ending(self.path)

    @property
    def label(self) -> str:
        """The rows in messages: `name`, or the path."""
        return str(self.path) if self.name is None else self.name

    def fail(self, location: str, reason: str) -> NoReturn:
        """Raise `DataError`: the rows at `location`, such as `line 3`, cannot be read."""
        raise DataError(
            f"{self.label} cannot be read as {self.format}: {location}: {reason}"
        ) from None


def file_ending(path: Path) -> str:
    """File ending in lower case: `.csv` of `a.csv` and of `a.CSV.gz`; empty if absent."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")
