"""Texts and their labels from files, folders and the hub: the only door to `datasets`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .documents import Documents, Table
from .errors import DataError
from .textfile import TextFile

FILES = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
TEXT_COLUMNS = ("text", "content", "document", "sentence", "story", "prompt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

Progress = Callable[[int, int], None]


def load_documents(
    data: str,
    text_column: str | None = None,
    split: str | None = None,
    lines: bool = False,
    scratch: Path | None = None,
) -> Documents:
    """Documents of a file, a saved `datasets` folder or a hub data set, by number.

    Nothing is kept in memory: `datasets` maps its files, those of others are copied to one
    without a name in the folder `scratch`.

    A .txt file is one document per `<|endoftext|>`-separated piece, or per line if `lines`;
    other formats give one document per row. Raises `DataError`.
    """
    path = Path(data).expanduser()
    if path.is_file():
        if _ending(path) == ".txt":
            return Documents(TextFile(path, lines, scratch))
        return _column(_load_file(path), text_column, data)
    if path.is_dir():
        return _column(_load_folder(path, split), text_column, data)
    if _ending(path) in FILES or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(f"{data} does not exist; give a file, a saved data set or a hub id")
    return _column(_load_hub(data, split), text_column, data)


def _ending(path: Path) -> str:
    """The ending without that of a compression."""
    return next((s for s in reversed(path.suffixes) if s not in COMPRESSIONS), "")


def _load_file(path: Path) -> Any:
    ending = _ending(path)
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; give a file with texts")
    kind = FILES.get(ending)
    if kind is None:
        known = ", ".join(FILES)
        raise DataError(f"{path.name} has no known ending; expected one of {known} (or .gz of one)")
    kwargs = {"delimiter": "\t"} if ending == ".tsv" else {}
    return _load(
        kind, f"{path} cannot be read as {kind}", data_files=str(path), split="train", **kwargs
    )


def _load_folder(path: Path, split: str | None) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds; all mean an unusable folder
        raise DataError(
            f"{path} is not a folder saved by datasets.save_to_disk: {_first(error)}"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        name = split or ("train" if "train" in found else next(iter(found)))
        if name not in found:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(map(str, found))}")
        return found[name]
    return found


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
        return datasets.load_dataset(kind, *args, **kwargs)
    except Exception as error:  # datasets raises many kinds; all mean unusable input
        raise DataError(f"{complaint}: {_first(error.__cause__ or error)}") from None
    finally:
        if enabled:
            datasets.enable_progress_bars()


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _column(rows: Any, name: str | None, data: str) -> Table:
    texts = [
        column
        for column, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if name is None:
        known = [column for column in TEXT_COLUMNS if column in texts]
        name = known[0] if known else texts[0] if len(texts) == 1 else None
    if name is None or name not in texts:
        wanted = f"no text column {name!r}" if name else "no obvious text column"
        listed = ", ".join(texts) or "none"
        raise DataError(
            f"{data} has {wanted}; text columns are: {listed} (choose with --text-column)"
        )
    return Table(rows, name, data)
