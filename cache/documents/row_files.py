"""Rows of .jsonl, .json, .csv, .tsv and .parquet files, one at a time, as the file says them.

Cells of .csv and .tsv are text, whatever they look like; an empty cell is the empty text. Values
of JSON and parquet keep their kinds. Nothing is taken for missing but JSON's and parquet's null,
and a key that a row lacks. What cannot be read is a `DataError` that names the line.
"""

from collections.abc import Iterator
from itertools import islice

from .csv_rows import csv_rows, tsv_rows
from .json_rows import json_rows
from .parquet_rows import parquet_rows, parquet_sample
from .row_source import Row, RowFile
from .text_column import ColumnSample

ROW_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""Ending -> format."""
SAMPLE_ROWS = 1000
SAMPLE_CHARACTERS = 4 << 20


def read_sample(file: RowFile) -> dict[str, ColumnSample]:
    """The columns, by the first rows or by the file's own schema."""
    if file.format == "parquet":
        return parquet_sample(file)
    columns: dict[str, ColumnSample] = {}
    size = 0
    for _, row in islice(read_rows(file, None), SAMPLE_ROWS):
        for name, value in row.items():
            columns.setdefault(name, ColumnSample()).add(value)
            size += len(value) if isinstance(value, str) else 0
        if size > SAMPLE_CHARACTERS:
            break
    file.notes.clear()  # the same is noted when all rows are read
    return columns


def read_rows(
    file: RowFile, text_column: str | None, others: bool = True
) -> Iterator[tuple[str, Row]]:
    """Each row with its place, like `line 3`; without `others` it may lack other columns.

    A row in which the text column occurs twice is an error, another one that does is noted.
    """
    if file.format == "json":
        return json_rows(file, text_column)
    if file.format == "parquet":
        return parquet_rows(file, text_column, others)
    return csv_rows(file, text_column) if file.format == "csv" else tsv_rows(file, text_column)
