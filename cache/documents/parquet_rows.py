"""Rows of .parquet files; columns that nobody needs are not read."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.disk_errors import disk_errors
from .labels import POSITION_COLUMNS
from .row_source import Row, RowFile
from .text_column import ColumnSample
from .text_lines import BLOCK_BYTES, COMPRESSIONS, open_bytes

PARQUET_ROWS = 64
"""Rows of one read."""


def parquet_sample(file: RowFile) -> dict[str, ColumnSample]:
    """The columns of the schema, with the first texts of those that hold text."""
    import pyarrow

    columns: dict[str, ColumnSample] = {}
    with _parquet_file(file) as opened:
        schema = opened.schema_arrow
        for entry in schema:
            if entry.name in columns:
                columns[entry.name].kinds.add("twice")
                continue
            if pyarrow.types.is_null(entry.type):
                columns[entry.name] = ColumnSample()
                continue
            columns[entry.name] = ColumnSample.of_type(_kind_of_type(entry.type))
            if pyarrow.types.is_nested(entry.type):
                columns[entry.name].add_layout(str(entry.type))
        texts = [name for name, column in columns.items() if column.is_text]
        if texts and opened.metadata.num_rows:
            batch = next(opened.iter_batches(PARQUET_ROWS, columns=texts))
            for name, values in zip(batch.schema.names, batch.columns, strict=True):
                if name in texts:
                    columns[name].words.extend(v for v in values.to_pylist() if v is not None)
    return columns


def parquet_rows(file: RowFile, text_column: str | None, others: bool) -> Iterator[tuple[str, Row]]:
    """Rows of the text column and, with `others`, of plain columns and those of positions."""
    with _parquet_file(file) as opened:
        names = opened.schema_arrow.names
        kinds = {entry.name: _kind_of_type(entry.type) for entry in opened.schema_arrow}
        for name in sorted({name for name in names if names.count(name) > 1}):
            del kinds[name]
            file.notes.append(f"the columns {name!r} are left out: there are two of that name")
        plain = ("text", "bytes", "a truth value", "a whole number", "a number")
        chosen = [
            name
            for name, kind in kinds.items()
            if name == text_column or (others and (kind in plain or name in POSITION_COLUMNS))
        ]
        number = 0
        for batch in opened.iter_batches(PARQUET_ROWS, columns=chosen):
            values = [column.to_pylist() for column in batch.columns]
            for row in zip(*values, strict=True):
                yield f"row {number}", dict(zip(batch.schema.names, row, strict=True))
                number += 1


@contextmanager
def _parquet_file(file: RowFile) -> Iterator[Any]:
    """The opened file, from a temporary uncompressed copy where it is compressed as a whole."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile(dir=file.scratch) as copy:
        source: Any = str(file.path)
        if file.path.suffix.lower() in COMPRESSIONS:
            with open_bytes(file.path) as packed, disk_errors(_folder(file.scratch)):
                shutil.copyfileobj(packed, copy, BLOCK_BYTES)
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


def _folder(scratch: Path | None) -> Path:
    return Path(tempfile.gettempdir()) if scratch is None else scratch


def _kind_of_type(found: Any) -> str:
    """What a column of a pyarrow type holds, in the words of `textcolumn.kind_of`."""
    import pyarrow.types as types

    if types.is_dictionary(found):
        return _kind_of_type(found.value_type)
    if hasattr(found, "storage_type"):  # an extension of a plain type
        return _kind_of_type(found.storage_type)
    if types.is_string(found) or types.is_large_string(found) or _is_view(found, "string"):
        return "text"
    if (
        types.is_binary(found)
        or types.is_large_binary(found)
        or types.is_fixed_size_binary(found)
        or _is_view(found, "binary")
    ):
        return "bytes"
    if types.is_boolean(found):
        return "a truth value"
    if types.is_integer(found):
        return "a whole number"
    if types.is_floating(found):
        return "a number"
    return "a list or object" if types.is_nested(found) else str(found)


def _is_view(found: Any, name: str) -> bool:
    import pyarrow.types as types

    return getattr(types, f"is_{name}_view", lambda _: False)(found)
