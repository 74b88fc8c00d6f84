"""Sentences with one of two words, for the shift between the words: `read_word_sentences`.

Sentences in the manner of Winogender (Rudinger et al., 1804.09301): `The technician told the
customer that he could pay with cash`. What is measured is the model's prediction after the text
before the word.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.errors import DataError, UsageError

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


@dataclass(frozen=True)
class WordSentence:
    """The text before the word as tokens, and the tokens with which both words begin."""

    text: str
    """The text before the word."""
    tokens: tuple[int, ...]
    first: int
    """Token of the first word."""
    second: int


@dataclass(frozen=True)
class WordSentences:
    """Sentences whose words begin with different tokens."""

    words: tuple[str, str]
    sentences: tuple[WordSentence, ...]
    without_word: int
    """Sentences of the file with neither word."""
    at_start: int
    """Sentences that begin with the word: nothing comes before it."""
    repeated: int
    """Sentences whose text before the word stood before."""
    not_distinguished: int
    """Sentences after which both words begin with one token, or change the tokens before them."""

    def describe(self) -> list[str]:
        """Sentences on what was left out."""
        parts = [
            (self.without_word, f"hold neither {self.words[0]!r} nor {self.words[1]!r}"),
            (self.at_start, "begin with the word"),
            (self.repeated, "repeat the text before the word of another one"),
            (self.not_distinguished, "have words that begin with one token, or tokens across them"),
        ]
        return [f"{count} sentences of the file {why}: left out." for count, why in parts if count]


def read_word_sentences(
    cache: "ActivationCache", path: str | Path, words: tuple[str, str]
) -> WordSentences:
    """The sentences of a .tsv, .csv, .jsonl, .parquet or .txt file that hold one of `words`.

    A table needs a column `sentence` or `text`; a .txt file has a sentence a line. Texts start as
    the tokenizer of the cache starts them. Raises `UsageError` for words that are empty or equal,
    `DataError` if no sentence is left.
    """
    first, second = (word.strip() for word in words)
    if not first or not second or first == second:
        raise UsageError(f"expected two different words, such as he,she, found {words}")
    texts = _read_texts(Path(path))
    tokenizer = cache.tokenizer()
    pattern = re.compile(rf"(?<!\w)(?:{re.escape(first)}|{re.escape(second)})(?!\w)")
    before = [text[: match.start()].rstrip() for text in texts if (match := pattern.search(text))]
    unique = list(dict.fromkeys(text for text in before if text))
    sentences = []
    for text in unique:
        prefix = tokenizer.encode(text).ids
        # The end of a text may have tokens of its own, such as one for its end.
        starts = [tokenizer.encode(f"{text} {word}").ids for word in (first, second)]
        common = _common_length(*starts)
        if common < 1 or any(common >= len(ids) for ids in starts) or common < len(prefix) - 1:
            continue
        sentences.append(
            WordSentence(text, tuple(starts[0][:common]), starts[0][common], starts[1][common])
        )
    if not sentences:
        raise DataError(
            f"no sentence of {path} holds {first!r} or {second!r} after other words as tokens that "
            "differ; give other --words, or a file with a sentence a line"
        )
    return WordSentences(
        words=(first, second),
        sentences=tuple(sentences),
        without_word=len(texts) - len(before),
        at_start=before.count(""),
        repeated=len(before) - before.count("") - len(unique),
        not_distinguished=len(unique) - len(sentences),
    )


def _common_length(first: list[int], second: list[int]) -> int:
    """Number of tokens that both lists start with."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


def _read_texts(path: Path) -> list[str]:
    """The sentences of a file; raises `DataError` if it cannot be read or has no such column."""
    import csv
    import json

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix in (".tsv", ".csv"):
                delimiter = "\t" if path.suffix == ".tsv" else ","
                rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
            elif path.suffix in (".jsonl", ".json"):
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                return [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as sentences ({reason}); expected a .tsv, .csv or .jsonl file "
            "with a column 'sentence', or a .txt file with a sentence a line"
        ) from None
    names = ("sentence", "text")
    dicts = [row for row in rows if isinstance(row, dict)]
    texts = [next((row[name] for name in names if row.get(name)), None) for row in dicts]
    found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        columns = ", ".join(map(str, dicts[0])) if dicts else "none"
        raise DataError(
            f"{path} has no column 'sentence' or 'text' with texts (columns: {columns})"
        )
    return found
