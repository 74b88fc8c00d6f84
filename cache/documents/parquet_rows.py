"""Rows of .parquet files, for `row_files.py`: only needed columns are read, 64 rows at a time."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.disk_errors import translate_disk_errors
from ..files.text_lines import BLOCK_BYTES, COMPRESSIONS, open_bytes
from .labels import POSITION_COLUMNS
from .row_source import Row, RowFile
from .text_column import ATTENTION_MASK, ColumnSample

PARQUET_ROWS = 64
"""Rows per read."""


def parquet_sample(file: RowFile) -> dict[str, ColumnSample]:
    """Column name -> sample, from the schema; columns of text with their first texts."""
    import pyarrow

    columns: dict[str, ColumnSample] = {}
    with _parquet_file(file) as opened:
        schema = opened.schema_arrow
        for entry in schema:
            if entry.name in columns:
                columns[entry.name].kinds.add("twice")
            elif pyarrow.types.is_null(entry.type):
                columns[entry.name] = ColumnSample()
            else:
                columns[entry.name] = ColumnSample.of_type(_kind_of_type(entry.type))
                if pyarrow.types.is_nested(entry.type):
                    columns[entry.name].add_layout(str(entry.type))
        text_columns = [name for name, column in columns.items() if column.is_text]
        if text_columns and opened.metadata.num_rows:
            batch = next(opened.iter_batches(PARQUET_ROWS, columns=text_columns))
            for name, values in zip(batch.schema.names, batch.columns, strict=True):
                if name in text_columns:
                    columns[name].texts.extend(
                        text for text in values.to_pylist() if text is not None
                    )
    return columns


def parquet_rows(
    file: RowFile, text_column: str | None, other_columns: bool
) -> Iterator[tuple[str, Row]]:
    """Yield the rows, with their location (`row 3`), of the text column.

    With `other_columns` also columns of plain values, which may be labels, and the columns that
    position policies read (`POSITION_COLUMNS`). Beside a text column of lists, the attention mask.
    """
    with _parquet_file(file) as opened:
        names = opened.schema_arrow.names
        kinds = {entry.name: _kind_of_type(entry.type) for entry in opened.schema_arrow}
        for name in sorted({name for name in names if names.count(name) > 1}):
            del kinds[name]
            file.notes.append(f"the columns {name!r} are left out: there are two of that name")
        plain_kinds = ("text", "bytes", "a truth value", "a whole number", "a number")
        columns = [
            name
            for name, kind in kinds.items()
            if name == text_column
            or (other_columns and (kind in plain_kinds or name in POSITION_COLUMNS))
            or (name == ATTENTION_MASK and kinds.get(text_column or "") == "a list or object")
        ]
        number = 0
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            columns_of_values = [column.to_pylist() for column in batch.columns]
            for values in zip(*columns_of_values, strict=True):
                yield f"row {number}", dict(zip(batch.schema.names, values, strict=True))
                number += 1


@contextmanager
def _parquet_file(file: RowFile) -> Iterator[Any]:
    """Open the file; a compressed file (.parquet.gz) is first unpacked into a temporary file."""
    import pyarrow
    import pyarrow.parquet

    folder = Path(tempfile.gettempdir()) if file.scratch is None else file.scratch
    with tempfile.TemporaryFile(dir=file.scratch) as copy:
        source: Any = str(file.path)
        if file.path.suffix.lower() in COMPRESSIONS:
            with open_bytes(file.path) as uncompressed, translate_disk_errors(folder):
                shutil.copyfileobj(uncompressed, copy, BLOCK_BYTES)
            copy.seek(0)
            source = pyarrow.PythonFile(copy, mode="r")
        try:
            with pyarrow.parquet.ParquetFile(
                source, memory_map=False, buffer_size=BLOCK_BYTES, pre_buffer=False
            ) as opened:
                yield opened
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{file.path} cannot be read as parquet: {reason[0]}") from None


def _kind_of_type(arrow_type: Any) -> str:
    """Kind of the values of a pyarrow type, in the words of `kind_in_words` (`text_column.py`)."""
    import pyarrow.types as types

    if types.is_dictionary(arrow_type):
        return _kind_of_type(arrow_type.value_type)
    if hasattr(arrow_type, "storage_type"):  # an extension type
        return _kind_of_type(arrow_type.storage_type)
    if (
        types.is_string(arrow_type)
        or types.is_large_string(arrow_type)
        or _is_view_type(arrow_type, "string")
    ):
        return "text"
    if (
        types.is_binary(arrow_type)
        or types.is_large_binary(arrow_type)
        or types.is_fixed_size_binary(arrow_type)
        or _is_view_type(arrow_type, "binary")
    ):
        return "bytes"
    if types.is_boolean(arrow_type):
        return "a truth value"
    if types.is_integer(arrow_type):
        return "a whole number"
    if types.is_floating(arrow_type):
        return "a number"
    return "a list or object" if types.is_nested(arrow_type) else str(arrow_type)


def _is_view_type(arrow_type: Any, name: str) -> bool:
    """Return whether `arrow_type` is `name`_view, which older pyarrow does not have."""
    import pyarrow.types as types

    return getattr(types, f"is_{name}_view", lambda _: False)(arrow_type)
