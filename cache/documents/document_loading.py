"""Loading of documents from files, a folder saved by `datasets`, or a data set of the hub.

`load_documents` is called by `extraction/resolve.py` and returns `Documents`; `documents.py` shows
all steps between a file and its documents. No other file imports the `datasets` library.
"""

import textwrap
from pathlib import Path
from typing import Any

from ..errors import DataError
from .data_files import FILE_FORMATS, DataFiles, open_data_files
from .documents import DatasetDocuments, Documents, RenderConversation, is_label_feature
from .given_rows import GivenTexts
from .row_source import RowFile, file_ending
from .row_table import RowTable
from .text_column import ColumnSample, check_column_exists, choose_text_column
from .text_file import SEPARATOR, TextFile

SAMPLE_ROWS = 200
"""Rows of a data set that are read to choose its text column."""


def load_documents(
    data: str,
    text_column: str | None = None,
    split: str | None = None,
    lines: bool = False,
    scratch: Path | None = None,
    separator: str | None = None,
    labels: bool = True,
    data_format: str | None = None,
    render: RenderConversation | None = None,
) -> Documents:
    """Documents of `data`: file, pattern, folder of files, saved data set, `-`, or hub id.

    A .txt file is one document per `<|endoftext|>`-separated piece, or one per line with `lines`;
    other formats give one document per row, its text in `text_column` (default: chosen by
    `choose_text_column`). A pattern like `data/*.jsonl`, and a folder, name files of one format,
    which are read in the order of their paths. `-` is standard input. `data_format` (`jsonl`,
    `txt`) replaces the endings. `split` chooses a split of a saved or hub data set; `separator`
    separates the columns of .csv and .tsv files. Without `labels` only texts are kept. `render`
    gives the text of a conversation; without it a column of conversations is an error.

    Nothing stays in memory: the texts of files are copied to an unnamed temporary file in the
    folder `scratch`, so later changes of the files do not matter. Raises `DataError`.
    """
    path = Path(data).expanduser()
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{data} is a link to {path.readlink()}, which does not exist; give a file, a saved "
            "data set or a hub id"
        )
    with open_data_files(data, data_format, scratch) as files:
        if files is not None:
            _check_options_of_files(files, text_column, split, separator)
            documents = _documents_of_files(
                files, text_column, lines, scratch, separator=separator, labels=labels,
                render=render,
            )  # fmt: skip
            documents.reading.notes[:0] = files.notes
            return documents
    if separator is not None:
        raise DataError(f"--separator is for .csv and .tsv files, not for {data}")

    # A folder or hub data set, read by `datasets`.
    if path.is_dir():
        return _load_folder(path, split, text_column, render)
    if path.exists():
        raise DataError(
            f"{data} is no regular file (a pipe, a device?), and texts are read more than once; "
            "write them into a file, or give - and redirect standard input"
        )
    if file_ending(path) in FILE_FORMATS or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(f"{data} does not exist; give a file, a saved data set or a hub id")
    return _dataset_documents(_load_hub(data, split), text_column, data, render)


def load_given_documents(
    texts: GivenTexts,
    text_column: str | None = None,
    split: str | None = None,
    scratch: Path | None = None,
    labels: bool = True,
    render: RenderConversation | None = None,
) -> Documents:
    """Documents of texts that were given in Python; see `load_documents`."""
    if texts.path is not None:
        if split is not None:
            raise DataError(f"split is for data sets that have several, not for {texts.name}")
        file = RowFile(texts.path, "json", None, scratch, name=texts.name)
        return RowTable(file, text_column, labels, texts.name, render)
    return _documents_of_split(texts.dataset, split, text_column, texts.name, render)


def _check_options_of_files(
    files: DataFiles, text_column: str | None, split: str | None, separator: str | None
) -> None:
    """Raise `DataError` for options of other kinds of sources."""
    if split is not None:
        kind = "one file" if len(files.paths) == 1 else "files"
        hint = "" if len(files.paths) == 1 else "; choose some with a pattern like 'data/train-*'"
        raise DataError(f"--split is for data sets that have several; {files.name} is {kind}{hint}")
    if separator is not None and files.format not in ("csv", "tsv"):
        raise DataError(f"--separator is for .csv and .tsv files, not for {files.name}")
    if text_column is not None and files.format == "text":
        raise DataError(f"--text-column is for tables; {files.name} has no columns")


def _documents_of_files(
    files: DataFiles,
    text_column: str | None,
    lines: bool,
    scratch: Path | None,
    *,
    separator: str | None,
    labels: bool,
    render: RenderConversation | None,
) -> Documents:
    """Documents of files of plain text, or of rows."""
    if files.format == "text":
        texts = TextFile(files.paths, lines, scratch)
        documents = Documents(texts)
        if texts.blank:
            documents.reading.notes.append(
                f"{texts.blank} documents between {SEPARATOR} marks are left out: they are empty"
            )
        return documents
    row_files = [
        RowFile(path, files.format, separator, scratch, name=files.label, ending=files.ending)
        for path in files.paths
    ]
    data = files.name if len(row_files) > 1 else None
    return RowTable(row_files, text_column, labels, data, render)


def _load_folder(
    path: Path, split: str | None, text_column: str | None, render: RenderConversation | None
) -> DatasetDocuments:
    """Documents of a folder saved by `datasets`: of `split`, else of `train`, else of its first."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds; all mean an unusable folder
        raise DataError(
            f"{path} is not a folder saved by datasets.save_to_disk, nor one of files that end in "
            f"{', '.join(FILE_FORMATS)}: {_short_message(error)}"
        ) from None
    return _documents_of_split(saved, split, text_column, str(path), render)


def _documents_of_split(
    rows: Any,
    split: str | None,
    text_column: str | None,
    data: str,
    render: RenderConversation | None,
) -> DatasetDocuments:
    """Documents of a `Dataset`, or of one split of a `DatasetDict`; `data` names them."""
    # A data set without splits.
    if not isinstance(rows, dict):
        if split is not None and split != str(rows.split):
            raise DataError(f"{data} has no split {split!r}; it is one data set without splits")
        return _dataset_documents(rows, text_column, data, render)

    # A data set with splits.
    name = split or ("train" if "train" in rows else next(iter(rows), "train"))
    names = ", ".join(map(str, rows)) or "none"
    if name not in rows:
        raise DataError(f"{data} has no split {name!r}; it has {names}")
    documents = _dataset_documents(rows[name], text_column, data, render)
    if split is None and name != "train":
        documents.reading.notes.append(
            f"the split {name!r} is read; there is no 'train' in {names}"
        )
    return documents


def _load_hub(name: str, split: str | None) -> Any:
    """A data set of the hub, fetched into the hub's own cache; `name` may end in `:config`."""
    import datasets

    repository, _, config_name = name.partition(":")
    options: dict[str, Any] = {"split": split or "train"}
    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        config = datasets.load_dataset_builder(repository, config_name or None).config
        if hasattr(config, "keep_default_na"):
            # Of .csv files: words like NA and null are text, only an empty cell is missing.
            options |= {"keep_default_na": False, "na_values": [""]}
        return datasets.load_dataset(repository, config_name or None, **options)
    except Exception as error:  # datasets raises many kinds; all mean unusable input
        raise DataError(
            f"{name} is neither a file here nor a data set that can be fetched: "
            f"{_short_message(error.__cause__ or error)}"
        ) from None
    finally:
        if enabled:
            datasets.enable_progress_bars()


def _short_message(error: BaseException) -> str:
    """At most 300 characters of an error's message, in one line."""
    message = " ".join(str(error).split())
    return textwrap.shorten(message, 300, placeholder=" ...") or type(error).__name__


def _dataset_documents(
    rows: Any, text_column: str | None, data: str, render: RenderConversation | None
) -> DatasetDocuments:
    """Documents of the data set `rows`, after its text column was chosen by types and samples."""
    columns = {name: _column_sample(rows, name, feature) for name, feature in rows.features.items()}
    choice = choose_text_column(columns, text_column, data, render is not None)
    check_column_exists(columns, choice.name, data)
    return DatasetDocuments(rows, choice, data, render)


def _column_sample(rows: Any, name: str, feature: Any) -> ColumnSample:
    """Sample of a column: the kind by its type, and texts of the first `SAMPLE_ROWS` rows."""
    kind = str(getattr(feature, "dtype", ""))
    if kind in ("string", "large_string"):
        column = ColumnSample.of_type("text")
        texts = rows.with_format(None).select_columns([name])[:SAMPLE_ROWS][name]
        column.texts.extend(text for text in texts if text is not None)
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
