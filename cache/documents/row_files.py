"""Rows of .jsonl, .json, .csv, .tsv and .parquet files: samples, and all rows, read one at a time.

`RowTable` calls `read_sample`, to choose the text column, then `read_rows`; both call the reader of
the file's format. Cells of .csv and .tsv are always text; an empty cell is the empty text.
Values of JSON and parquet keep their kinds. Missing are only null, in JSON and parquet, and a key
that a row lacks. Errors of reading are `DataError`s with the line.
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
"""File ending -> format."""
SAMPLE_ROWS = 1000
"""Rows of a sample at most."""
SAMPLE_CHARACTERS = 4 << 20
"""Characters after which a sample takes no further row."""


def read_sample(file: RowFile) -> dict[str, ColumnSample]:
    """Column name -> sample, from the first rows, or from the schema of a parquet file."""
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
    file.notes.clear()  # read_rows notes the same again
    return columns


def read_rows(
    file: RowFile, text_column: str | None, other_columns: bool = True
) -> Iterator[tuple[str, Row]]:
    """Yield each row with its location in the file, such as `line 3`.

    Without `other_columns` a row may lack all columns but `text_column`. The text column twice in
    a row is a `DataError`; another column twice is noted in `file.notes`.
    """
    if file.format == "json":
        return json_rows(file, text_column)
    if file.format == "parquet":
        return parquet_rows(file, text_column, other_columns)
    return csv_rows(file, text_column) if file.format == "csv" else tsv_rows(file, text_column)
