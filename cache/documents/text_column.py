"""Which column of a table holds the texts: the one that is asked for, or the obvious one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError

TEXT_COLUMNS = ("text", "content", "document", "sentence", "story", "prompt")
"""Names of columns that hold texts, the surest first."""
CONVERSATIONS = re.compile(r"messages?|conversations?|chats?|dialog(ue)?s?|turns", re.IGNORECASE)
"""Names of columns that hold lists of what people and a model say by turns."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
WORDS = re.compile(
    # Letters with a space between, or of a script that has none: Thai, Lao, Burmese, Khmer, CJK.
    r"\S\s+\S|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
FEW_ROWS = 20
"""Rows from which on texts that repeat each other are labels."""


@dataclass
class ColumnSample:
    """What the first rows of a column hold."""

    kinds: set[str] = field(default_factory=set)
    """`kind_of` the values that are not missing."""
    words: list[str] = field(default_factory=list)
    """The texts among them."""
    holds_turns: bool = False
    """Whether there are lists of objects with the keys of a conversation."""

    @classmethod
    def of_type(cls, kind: str) -> "ColumnSample":
        """A column of a table that says what its columns hold."""
        return cls({kind})

    def add(self, value: Any) -> None:
        """Take a value in."""
        if value is None:
            return
        self.kinds.add(kind_of(value))
        if isinstance(value, str):
            self.words.append(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            self.holds_turns |= _are_turns(set(value[0]))

    def add_layout(self, layout: str) -> None:
        """Take in how a nested column is laid out, as its library writes it."""
        self.holds_turns |= _are_turns(set(re.findall(r"\w+", layout)))

    @property
    def is_text(self) -> bool:
        """Whether all values that are not missing are text."""
        return self.kinds == {"text"}

    @property
    def is_nested(self) -> bool:
        return bool(self.kinds & {"a list", "an object", "a list or object"})

    @property
    def is_number(self) -> bool:
        """Whether all texts are numbers."""
        filled = [word for word in self.words if word.strip()]
        return bool(filled) and all(NUMBER.fullmatch(word.strip()) for word in filled)

    @property
    def is_prose(self) -> bool:
        """Whether the texts look like texts: most have words, and do not repeat each other."""
        filled = [word for word in self.words if word.strip()]
        worded = sum(WORDS.search(word) is not None for word in filled)
        repeats = len(filled) >= FEW_ROWS and len(set(filled)) < len(filled) / 2
        return 2 * worded > len(filled) and not repeats


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    for kind, name in (
        (bool, "a truth value"), (int, "a whole number"), (float, "a number"), (str, "text"),
        (bytes, "bytes"), (list, "a list"), (dict, "an object"), (type(None), "null"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _are_turns(keys: set[str]) -> bool:
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def choose_text_column(
    columns: Mapping[str, ColumnSample], asked: str | None, data: str
) -> tuple[str, str | None]:
    """The column of the texts, and how it was found, None if it was asked for.

    Without `asked`: a column of one of the names `TEXT_COLUMNS`; else the only column of text, if
    it looks like texts and no other column could hold them. Raises `DataError`.
    """
    if not columns:
        raise DataError(f"{data} has no rows; give a file with texts")
    if asked is not None:
        _check_asked(columns, asked, data)
        return asked, None
    conversations = [
        name
        for name, column in columns.items()
        if column.holds_turns or (column.is_nested and CONVERSATIONS.fullmatch(name))
    ]
    texts = [name for name, column in columns.items() if column.is_text]
    usual = TEXT_COLUMNS[:1] if conversations else TEXT_COLUMNS
    for name in usual:
        if name in columns and ("text" in columns[name].kinds or not columns[name].kinds):
            _check_asked(columns, name, data)
            return name, "by its name"
    if conversations:
        raise DataError(
            f"{data} has no obvious text column but conversations (column "
            f"{_shown(conversations[0])}), and no chat template is applied; write their text into "
            f"a column and choose it with --text-column; text columns are: {_texts(columns)}"
        )
    candidates = [name for name in texts if not columns[name].is_number]
    if len(candidates) == 1:
        (only,) = candidates
        nested = [name for name, column in columns.items() if column.is_nested or
                  "bytes" in column.kinds]  # fmt: skip
        if len(columns) == 1:
            return only, "the only column"
        if columns[only].is_prose and not nested:
            return only, "the only column of text"
    raise DataError(
        f"{data} has no obvious text column; text columns are: {_texts(columns)} (choose with "
        "--text-column)"
    )


def _check_asked(columns: Mapping[str, ColumnSample], name: str, data: str) -> None:
    """Raise `DataError` if the first rows show that the column holds no text."""
    found = columns.get(name)
    if found is not None and "twice" in found.kinds:
        raise DataError(f"{data} has two columns {name!r}; rename one")
    # Where only some rows hold text, reading them names the first that does not.
    if found is not None and "text" not in found.kinds and found.kinds - {"bytes"}:
        other = ", ".join(sorted(found.kinds - {"text"}))
        hint = "; no chat template is applied to conversations" if found.holds_turns else ""
        raise DataError(
            f"{data} has no text column {name!r}; text columns are: {_texts(columns)} (choose with "
            f"--text-column; {name!r} holds {other}{hint})"
        )


def check_column_exists(columns: Mapping[str, ColumnSample], name: str, data: str) -> None:
    """Raise `DataError` if there is no column `name`."""
    if name not in columns:
        raise DataError(
            f"{data} has no text column {name!r}; text columns are: {_texts(columns)} (choose with "
            "--text-column)"
        )


def _texts(columns: Mapping[str, ColumnSample]) -> str:
    """The names of the columns of text; without any, of all, with what they hold."""
    texts = [_shown(name) for name, column in columns.items() if column.is_text]
    if texts or not columns:
        return ", ".join(texts) or "none"
    held = (
        f"{_shown(name)} holds {', '.join(sorted(column.kinds)) or 'nothing'}"
        for name, column in columns.items()
    )
    return f"none; {'; '.join(held)}"


def _shown(name: str) -> str:
    """A name, in quotes where it would not be seen as one."""
    return name if re.fullmatch(r"[\w.:/+-]+", name) else repr(name)
