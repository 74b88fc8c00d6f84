"""Texts -> token stream: the only door to `datasets`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError
from .tokens import TokenStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SEPARATOR = "<|endoftext|>"
"""Where a .txt file has this mark, it separates documents."""
TEXT_COLUMNS = ("text", "content", "document", "sentence", "story", "prompt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
READ_ROWS = 256

Progress = Callable[[int, int], None]


def load_documents(
    data: str, text_column: str | None = None, split: str | None = None, lines: bool = False
) -> Sequence[str]:
    """Documents of a file, a saved `datasets` folder or a hub data set, by number.

    A .txt file is one document per `<|endoftext|>`-separated piece, or per line if `lines`;
    other formats give one document per row. Raises `DataError`.
    """
    path = Path(data).expanduser()
    if path.is_file():
        if _ending(path) == ".txt":
            return _text_documents(path, lines)
        return _column(_load_file(path), text_column, data)
    if path.is_dir():
        return _column(_load_folder(path, split), text_column, data)
    if _ending(path) in FILES or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(f"{data} does not exist; give a file, a saved data set or a hub id")
    return _column(_load_hub(data, split), text_column, data)


def _ending(path: Path) -> str:
    """The ending without that of a compression."""
    return next((s for s in reversed(path.suffixes) if s not in COMPRESSIONS), "")


def _text_documents(path: Path, lines: bool) -> list[str]:
    import fsspec

    try:
        opened: Any = fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig")
        with opened as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    if SEPARATOR in text:
        documents = [piece.strip("\n") for piece in text.split(SEPARATOR)]
    else:
        documents = text.split("\n") if lines else [text]
    return [document for document in documents if document.strip()]


def _load_file(path: Path) -> Any:
    ending = _ending(path)
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


class _Column(Sequence[str]):
    """One text column of a data set, read by row numbers."""

    def __init__(self, rows: Any, name: str, data: str) -> None:
        self.rows = rows.select_columns([name])
        self.name = name
        self.data = data

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.rows[key][self.name]
        except UnicodeDecodeError:
            raise DataError(f"{self.data} is not UTF-8 text; convert it first") from None


def _column(rows: Any, name: str | None, data: str) -> _Column:
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
    return _Column(rows, name, data)


def tokenize(
    documents: Sequence[str],
    tokenizer: "Tokenizer",
    *,
    context: int,
    pack: bool,
    separator: int | None,
    seed: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """Token stream of `documents` in an order permuted by `seed`.

    Packed: documents, each begun by the tokenizer's own mark or else by `separator`, are cut
    into sequences of `context` tokens; the last may be shorter. Not packed: one sequence per
    document, cut at `context`. `max_tokens` ends the stream after the last whole sequence.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    marked = (
        tokenizer.encode("a").ids[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]
    )
    prefix = [] if marked or separator is None or not pack else [separator]
    pieces: list[np.ndarray] = []
    rows: list[int] = []
    total = 0
    for row, ids in _cut(_encode(documents, order, tokenizer, prefix, progress), context, pack):
        if max_tokens is not None and total + len(ids) > max_tokens:
            break
        pieces.append(ids)
        rows.append(row)
        total += len(ids)
    if not total:
        least = (
            f"; max_tokens={max_tokens} is less than one sequence" if max_tokens is not None else ""
        )
        raise DataError(f"the data hold no text ({len(documents)} documents){least}")
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return TokenStream(np.concatenate(pieces), lengths, np.array(rows, np.int64))


def _encode(
    documents: Sequence[str],
    order: np.ndarray,
    tokenizer: "Tokenizer",
    prefix: list[int],
    progress: Progress | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and token ids of each document, in `order`; empty documents are left out."""
    for start in range(0, len(order), READ_ROWS):
        numbers = [int(number) for number in order[start : start + READ_ROWS]]
        texts = (
            documents[numbers]
            if isinstance(documents, _Column)
            else [documents[n] for n in numbers]
        )
        kept = [(n, text) for n, text in zip(numbers, texts, strict=True) if text and text.strip()]
        encodings = tokenizer.encode_batch([text for _, text in kept])
        for (number, _), encoding in zip(kept, encodings, strict=True):
            if ids := prefix + encoding.ids:
                yield number, np.array(ids, np.int32)
        if progress is not None:
            progress(min(start + READ_ROWS, len(order)), len(order))


def _cut(
    encoded: Iterator[tuple[int, np.ndarray]], context: int, pack: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Sequences of at most `context` tokens with the number of the document each starts in."""
    if not pack:
        for number, ids in encoded:
            yield number, ids[:context]
        return
    held: list[np.ndarray] = []
    size, first = 0, -1
    for number, ids in encoded:
        start = 0
        while start < len(ids):
            if size == 0:
                first = number
            take = min(context - size, len(ids) - start)
            held.append(ids[start : start + take])
            size, start = size + take, start + take
            if size == context:
                yield first, np.concatenate(held)
                held, size = [], 0
    if size:
        yield first, np.concatenate(held)
