"""The files of studies: a page, pictures and tables, checked before the work."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ....cache.errors import UsageError
from ....cache.files.disk_errors import check_file_target
from ....cache.files.json_files import make_folder, write_atomically
from ....cache.optional_libraries import require_extra
from .study_result import StudyResult, StudyTable


@dataclass(frozen=True)
class StudyFiles:
    """Where the results of studies go; None writes nothing."""

    html: Path | None = None
    """File of the page."""
    png: Path | None = None
    """Folder of the pictures, `STUDY-FIGURE.png`."""
    csv: Path | None = None
    """Folder of the tables, `STUDY-TABLE.csv`."""

    def check(self) -> None:
        """Raise `UsageError` unless all can be written; `MissingLibraryError` for the extra."""
        if self.html is not None or self.png is not None:
            require_extra("report", "pictures of a study")
        if self.html is not None:
            check_file_target(self.html, "study.html")
        for folder in (self.png, self.csv):
            if folder is not None:
                if folder.exists() and not folder.is_dir():
                    raise UsageError(f"{folder} is a file; name a folder, such as {folder}-files")
                make_folder(folder)

    def write(
        self,
        results: Sequence[StudyResult],
        command: str | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Write the files of `results`; gives their paths. The page quotes `command`."""
        written: list[Path] = []
        if self.csv is not None:
            written += [
                write_table(table, self.csv / f"{result.study}-{table.name}.csv")
                for result in results
                for table in result.tables
                if table.rows
            ]
        if self.png is not None:
            from ...report.picture_files import write_figure

            for result in results:
                for figure in result.figures:
                    path = self.png / f"{result.study}-{figure.name}.png"
                    write_figure(result.plot(figure.name), path)
                    written.append(path)
        if self.html is not None:
            from .study_page import write_study_page

            written.append(write_study_page(results, self.html, command, skipped))
        return [str(path) for path in written]


def write_table(table: StudyTable, path: Path) -> Path:
    """Write all fields of the rows for other programs; an interval is two columns."""
    text = StringIO()
    rows = [_flat_row(row) for row in table.rows]
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    return path


def _flat_row(row: Any) -> dict[str, Any]:
    """Fields of a row; `x_interval` becomes `x_low` and `x_high`, an unknown value is empty."""
    flat: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name.endswith("_interval") or name == "interval":
            start = name.removesuffix("interval")
            low, high = value or (None, None)
            flat |= {f"{start}low": low, f"{start}high": high}
        else:
            flat[name] = value
    return {name: "" if value is None else value for name, value in flat.items()}
