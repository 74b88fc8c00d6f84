"""Texts and their labels from files, folders and the hub: the only door to `datasets`."""

import textwrap
from pathlib import Path
from typing import Any

from ..errors import DataError
from .documents import DatasetDocuments, Documents, is_label_feature
from .row_files import ROW_FORMATS
from .row_source import RowFile, file_ending
from .row_table import RowTable
from .text_column import ColumnSample, check_column_exists, choose_text_column
from .text_file import SEPARATOR, TextFile

FILE_FORMATS = {".txt": "text", **ROW_FORMATS}
"""Ending -> format of the files that are read."""
SAMPLE_ROWS = 200


def load_documents(
    data: str,
    text_column: str | None = None,
    split: str | None = None,
    lines: bool = False,
    scratch: Path | None = None,
    separator: str | None = None,
    labels: bool = True,
) -> Documents:
    """Documents of a file, a saved `datasets` folder or a hub data set, by number.

    Nothing is kept in memory: the texts of a file are copied to one without a name in the folder
    `scratch`, so they are those that the file has now; `datasets` maps the files of others.

    A .txt file is one document per `<|endoftext|>`-separated piece, or per line if `lines`;
    other formats give one document per row. `separator` is that of the columns of .csv and .tsv.
    Without `labels` only the texts of a file are kept. Raises `DataError`.
    """
    path = Path(data).expanduser()
    if split is not None and path.is_file():
        raise DataError(f"--split is for data sets that have several; {data} is one file")
    format_ = FILE_FORMATS.get(file_ending(path)) if path.is_file() else None
    if separator is not None and format_ not in ("csv", "tsv"):
        raise DataError(f"--separator is for .csv and .tsv files, not for {data}")
    if path.is_file():
        if format_ is None:
            known = ", ".join(FILE_FORMATS)
            raise DataError(
                f"{path.name} has no known ending; expected one of {known} (or .gz of one)"
            )
        if not path.stat().st_size:
            raise DataError(f"{path} is empty; give a file with texts")
        if format_ == "text":
            if text_column is not None:
                raise DataError(f"--text-column is for tables; {data} has no columns")
            texts = TextFile(path, lines, scratch)
            documents = Documents(texts)
            if texts.blank:
                documents.reading.notes.append(
                    f"{texts.blank} documents between {SEPARATOR} marks are left out: they are "
                    "empty"
                )
            return documents
        return RowTable(RowFile(path, format_, separator, scratch), text_column, labels)
    if path.is_dir():
        return _load_folder(path, split, text_column)
    if file_ending(path) in FILE_FORMATS or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(f"{data} does not exist; give a file, a saved data set or a hub id")
    return _table(_load_hub(data, split), text_column, data)


def _load_folder(path: Path, split: str | None, text_column: str | None) -> DatasetDocuments:
    """The documents of a folder saved by `datasets`: of one split where it has several."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds; all mean an unusable folder
        raise DataError(
            f"{path} is not a folder saved by datasets.save_to_disk: {_beginning(error)}"
        ) from None
    if not isinstance(found, datasets.DatasetDict):
        if split is not None and split != str(found.split):
            raise DataError(f"{path} has no split {split!r}; it is one data set without splits")
        return _table(found, text_column, str(path))
    name = split or ("train" if "train" in found else next(iter(found), "train"))
    listed = ", ".join(map(str, found)) or "none"
    if name not in found:
        raise DataError(f"{path} has no split {name!r}; it has {listed}")
    table = _table(found[name], text_column, str(path))
    if split is None and name != "train":
        table.reading.notes.append(f"the split {name!r} is read; there is no 'train' in {listed}")
    return table


def _load_hub(name: str, split: str | None) -> Any:
    repository, _, config = name.partition(":")
    args = (config,) if config else ()
    return _load(
        repository,
        f"{name} is neither a file here nor a data set that can be fetched",
        *args,
        split=split or "train",
    )


def _load(kind: str, complaint: str, *args: Any, **kwargs: Any) -> Any:
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        config = datasets.load_dataset_builder(kind, *args).config
        if hasattr(config, "keep_default_na"):
            # Of .csv files: words like NA and null are text, only an empty cell is missing.
            kwargs |= {"keep_default_na": False, "na_values": [""]}
        return datasets.load_dataset(kind, *args, **kwargs)
    except Exception as error:  # datasets raises many kinds; all mean unusable input
        raise DataError(f"{complaint}: {_beginning(error.__cause__ or error)}") from None
    finally:
        if enabled:
            datasets.enable_progress_bars()


def _beginning(error: BaseException) -> str:
    """The first characters of what an error says, in one line."""
    said = " ".join(str(error).split())
    return textwrap.shorten(said, 300, placeholder=" ...") or type(error).__name__


def _table(rows: Any, text_column: str | None, data: str) -> DatasetDocuments:
    """The documents of a data set."""
    columns = {name: _sample(rows, name, feature) for name, feature in rows.features.items()}
    name, found = choose_text_column(columns, text_column, data)
    check_column_exists(columns, name, data)
    table = DatasetDocuments(rows, name, data)
    table.reading.column_reason = found
    return table


def _sample(rows: Any, name: str, feature: Any) -> ColumnSample:
    """What a column holds, by its type, and the first of its texts."""
    kind = str(getattr(feature, "dtype", ""))
    if kind in ("string", "large_string"):
        column = ColumnSample.of_type("text")
        words = rows.with_format(None).select_columns([name])[:SAMPLE_ROWS][name]
        column.words.extend(word for word in words if word is not None)
        return column
    if kind in ("binary", "large_binary"):
        return ColumnSample.of_type("bytes")
    if kind == "null":
        return ColumnSample()
    if is_label_feature(feature):
        return ColumnSample.of_type("a number")
    column = ColumnSample.of_type("a list or object" if kind in ("list", "dict", "") else kind)
    column.add_layout(repr(feature))
    return column
