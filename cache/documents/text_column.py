"""Choice of the column of the documents: named by the user, or obvious from names and samples.

`choose_text_column` compares one `ColumnSample` per column, made of the first rows (`row_files.py`)
or a schema (`parquet_rows.py`, `load_documents.py`). If the choice is doubtful, it raises
`DataError`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import DataError

TEXT_COLUMNS = ("text", "content", "document", "sentence", "story", "prompt")
"""Usual names of text columns, in order of preference."""
TOKEN_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
"""Columns of rows that are token ids already, as tokenizers of transformers name them."""
CONVERSATIONS = re.compile(r"messages?|conversations?|chats?|dialog(ue)?s?|turns", re.IGNORECASE)
"""Usual names of columns of conversations: lists of turns of users and a model."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""Pattern of a number."""
SEVERAL_WORDS = re.compile(
    # Characters around a space, or one of a script without spaces: Thai, Lao, Burmese, Khmer, CJK.
    r"\S\s+\S|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
"""Pattern found in a text of several words."""
ID_LIST = re.compile(
    r"(large_|fixed_size_)?list(_view)?<\w+: u?int\d+( not null)?>(\[\d+\])?"  # of pyarrow
    r"|(Large)?List\((feature=)?Value\((dtype=)?'u?int\d+'.*\)"  # of datasets
    r"|Sequence\(feature=Value\(dtype='u?int\d+'.*\)"
)
"""Pattern of the type of a list of whole numbers, as its library prints the type."""
FEW_ROWS = 20
"""Number of texts from which on many repetitions mean a label, not a text."""


@dataclass
class ColumnSample:
    """Kinds and texts of the first values of a column."""

    kinds: set[str] = field(default_factory=set)
    """Kinds (`kind_in_words`) of the present values."""
    texts: list[str] = field(default_factory=list)
    """Present values of type text."""
    holds_turns: bool = False
    """Whether values are lists of objects with the keys of a conversation."""
    holds_ids: bool = False
    """Whether values are lists of whole numbers."""
    holds_other_lists: bool = False
    """Whether values are lists of something else."""

    @classmethod
    def of_type(cls, kind: str) -> "ColumnSample":
        """Sample of a column whose `kind` the table's schema gives."""
        return cls({kind})

    def add(self, value: Any) -> None:
        """Add one value to the sample."""
        if value is None:
            return
        self.kinds.add(kind_in_words(value))
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, list) and value:
            has_ids = all(type(item) is int for item in value)
            self.holds_ids |= has_ids
            self.holds_other_lists |= not has_ids
            if isinstance(value[0], dict):
                self.holds_turns |= _are_turns(set(value[0]))

    def add_layout(self, layout: str) -> None:
        """Add the type of a nested column, as its library prints the type."""
        self.holds_turns |= _are_turns(set(re.findall(r"\w+", layout)))
        self.holds_ids |= ID_LIST.fullmatch(layout) is not None

    @property
    def is_text(self) -> bool:
        """Whether all present values are text."""
        return self.kinds == {"text"}

    @property
    def is_nested(self) -> bool:
        """Whether some values are lists or objects."""
        return bool(self.kinds & {"a list", "an object", "a list or object"})

    @property
    def is_ids(self) -> bool:
        """Whether all present values are lists of whole numbers, and some are not empty."""
        is_list = self.kinds <= {"a list", "a list or object"}
        return self.holds_ids and is_list and not self.holds_other_lists

    @property
    def is_number(self) -> bool:
        """Whether all texts are numbers."""
        texts = [text.strip() for text in self.texts if text.strip()]
        return bool(texts) and all(NUMBER.fullmatch(text) for text in texts)

    @property
    def is_prose(self) -> bool:
        """Whether the texts look like prose: most have several words, and few are repeated."""
        texts = [text for text in self.texts if text.strip()]
        prose_count = sum(SEVERAL_WORDS.search(text) is not None for text in texts)
        repeats = len(texts) >= FEW_ROWS and len(set(texts)) < len(texts) / 2
        return 2 * prose_count > len(texts) and not repeats


KINDS = (
    (bool, "a truth value"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "text"),
    (bytes, "bytes"),
    (list, "a list"),
    (dict, "an object"),
    (type(None), "null"),
)
"""Type -> name for messages; bool stands before int, its base class."""


def kind_in_words(value: Any) -> str:
    """The kind of a value, such as `a whole number`, for messages and comparisons."""
    return next((name for kind, name in KINDS if isinstance(value, kind)), type(value).__name__)


def _are_turns(keys: set[str]) -> bool:
    """Return whether `keys` belong to a turn of a conversation."""
    return {"role", "content"} <= keys or {"from", "value"} <= keys


@dataclass(frozen=True)
class ColumnChoice:
    """The column that holds the documents of a table, and what it holds."""

    name: str
    holds: Literal["text", "token ids", "conversations"]
    reason: str | None
    """Why the column was chosen; None if the user named it."""


def choose_text_column(
    columns: Mapping[str, ColumnSample],
    requested: str | None,
    data: str,
    with_template: bool = False,
) -> ColumnChoice:
    """The column of the documents: `requested`, else the obvious one.

    Obvious is a column named as in `TEXT_COLUMNS`; else `input_ids`, if it holds lists of token
    ids; else the only column of text, if its texts look like prose and no other column could hold
    the texts. Conversations are chosen only `with_template`, a chat template that renders them.
    Raises `DataError`.
    """
    if not columns:
        raise DataError(f"{data} has no rows; give a file with texts")
    if requested is not None:
        return _requested_column(columns, requested, data, with_template)

    # A column with a usual name; beside conversations only the name "text" is believed.
    conversations = [
        name
        for name, column in columns.items()
        if column.holds_turns or (column.is_nested and CONVERSATIONS.fullmatch(name))
    ]
    for name in TEXT_COLUMNS[:1] if conversations else TEXT_COLUMNS:
        if name in columns and ("text" in columns[name].kinds or not columns[name].kinds):
            _check_holds_text(columns, name, data)
            return ColumnChoice(name, "text", "by its name")
    has_ids = TOKEN_IDS in columns and columns[TOKEN_IDS].is_ids
    turns = [name for name in conversations if columns[name].holds_turns]
    if conversations and not (with_template and len(turns) == 1 and not has_ids):
        raise DataError(_no_text_but_conversations(columns, conversations, data, with_template))
    if conversations:
        return ColumnChoice(turns[0], "conversations", "the only column of conversations")
    if has_ids:
        return ColumnChoice(TOKEN_IDS, "token ids", "by its name")

    # The only column of text.
    candidates = [
        name for name, column in columns.items() if column.is_text and not column.is_number
    ]
    if len(candidates) == 1:
        (name,) = candidates
        if len(columns) == 1:
            return ColumnChoice(name, "text", "the only column")
        may_hold_text = any(
            column.is_nested or "bytes" in column.kinds for column in columns.values()
        )
        if columns[name].is_prose and not may_hold_text:
            return ColumnChoice(name, "text", "the only column of text")
    ids = [_quoted_name(name) for name, column in columns.items() if column.is_ids]
    hint = f"; lists of whole numbers, perhaps of token ids, are: {', '.join(ids)}" if ids else ""
    raise DataError(
        f"{data} has no obvious text column; text columns are: {_list_text_columns(columns)}{hint} "
        "(choose with --text-column)"
    )


def _requested_column(
    columns: Mapping[str, ColumnSample], name: str, data: str, with_template: bool
) -> ColumnChoice:
    """The choice of the column `name`, which the user named."""
    column = columns.get(name)
    if column is not None and "twice" not in column.kinds:
        if column.is_ids:
            return ColumnChoice(name, "token ids", None)
        if column.holds_turns and with_template:
            return ColumnChoice(name, "conversations", None)
    _check_holds_text(columns, name, data)
    return ColumnChoice(name, "text", None)


def _no_text_but_conversations(
    columns: Mapping[str, ColumnSample], names: list[str], data: str, with_template: bool
) -> str:
    """Message for a table without an obvious text column that has columns of conversations."""
    if with_template:
        others = [*names, TOKEN_IDS] if TOKEN_IDS in columns else names
        return (
            f"{data} has no obvious text column but {', '.join(map(_quoted_name, others))}; choose "
            "a column of conversations (lists of turns with role and content), of token ids or of "
            f"text with --text-column; text columns are: {_list_text_columns(columns)}"
        )
    return (
        f"{data} has no obvious text column but conversations (column {_quoted_name(names[0])}), "
        "and no chat template is applied, as the model has none; write their text into a column "
        f"and choose it with --text-column; text columns are: {_list_text_columns(columns)}"
    )


def _check_holds_text(columns: Mapping[str, ColumnSample], name: str, data: str) -> None:
    """Raise `DataError` if the first rows show that the column `name` holds no text."""
    column = columns.get(name)
    if column is None:
        return
    if "twice" in column.kinds:
        raise DataError(f"{data} has two columns {name!r}; rename one")
    # If only some rows hold text, reading all rows names the first row that does not.
    if "text" not in column.kinds and column.kinds - {"bytes"}:
        kinds = ", ".join(sorted(column.kinds - {"text"}))
        hint = "; no chat template is applied to conversations" if column.holds_turns else ""
        raise DataError(
            f"{data} has no text column {name!r}; text columns are: "
            f"{_list_text_columns(columns)} (choose with --text-column; {name!r} holds "
            f"{kinds}{hint})"
        )


def check_column_exists(columns: Mapping[str, ColumnSample], name: str, data: str) -> None:
    """Raise `DataError` if no column has the name `name`."""
    if name not in columns:
        raise DataError(
            f"{data} has no text column {name!r}; text columns are: {_list_text_columns(columns)} "
            "(choose with --text-column)"
        )


def _list_text_columns(columns: Mapping[str, ColumnSample]) -> str:
    """Names of the text columns, for messages; without any, all columns with their kinds."""
    names = [_quoted_name(name) for name, column in columns.items() if column.is_text]
    if names or not columns:
        return ", ".join(names) or "none"
    kinds = (
        f"{_quoted_name(name)} holds {', '.join(sorted(column.kinds)) or 'nothing'}"
        for name, column in columns.items()
    )
    return f"none; {'; '.join(kinds)}"


def _quoted_name(name: str) -> str:
    """`name` for a message, in quotes if spaces or punctuation would hide its bounds."""
    return name if re.fullmatch(r"[\w.:/+-]+", name) else repr(name)
