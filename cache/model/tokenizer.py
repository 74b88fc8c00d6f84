"""The model's tokenizer as `AutoTokenizer` loads it, remembered by the content of its files.

transformers applies tokenizer_config.json and the class of the tokenizer over tokenizer.json, so
only transformers can say what the tokenizer is. Loading it takes seconds: the result is kept as
JSON in the user's cache folder, beside the digests of weight files.
"""

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, ResiduaError
from ..files.json_files import json_digest, read_json, write_json
from .transformers_guard import guard_transformers
from .weight_digests import memo_path, remembered_file_digests

if TYPE_CHECKING:
    from tokenizers import Tokenizer


PATTERNS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files of a model's folder that may have a say in its tokens."""
KEPT = 100
"""Tokenizers that are remembered."""


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of the model in `folder`, without truncation and padding.

    Raises `ModelError` if there is none, or none that is of the `tokenizers` library.
    """
    memo = _memo(folder, trust_remote_code)
    tokenizer = _remembered(memo)
    if tokenizer is None:
        tokenizer = convert_tokenizer(folder, trust_remote_code)
        _whole(tokenizer)
        _remember(memo, tokenizer)
    return _whole(tokenizer)


def read_tokenizer_file(path: Path) -> "Tokenizer":
    """The tokenizer that a tokenizer.json holds by itself."""
    from tokenizers import Tokenizer

    try:
        return _whole(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {error}") from None


def tokenizer_digest(tokenizer: "Tokenizer") -> str:
    """sha256 of the tokenizer itself, as its canonical JSON."""
    return json_digest(json.loads(tokenizer.to_str()))


def _whole(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _memo(folder: Path, trust_remote_code: bool) -> Path:
    """Where the tokenizer of just these files, code and libraries is remembered."""
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})
    about = {
        "files": remembered_file_digests(path for path in files if path.is_file()),
        "code": trust_remote_code,
        "versions": [version("transformers"), version("tokenizers")],
    }
    return memo_path().parent / "tokenizers" / f"{json_digest(about)}.json"


def _remembered(memo: Path) -> "Tokenizer | None":
    from tokenizers import Tokenizer

    with suppress(ResiduaError, OSError):
        text = read_json(memo).get("tokenizer")
        if isinstance(text, str):
            with suppress(Exception):  # tokenizers raises bare Exception
                return Tokenizer.from_str(text)
    return None


def _remember(memo: Path, tokenizer: "Tokenizer") -> None:
    """A folder that cannot be written costs only the memo."""
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        others = sorted(memo.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in others[: max(0, len(others) + 1 - KEPT)]:
            old.unlink(missing_ok=True)
        write_json(memo, {"tokenizer": tokenizer.to_str()})


PROBES = (
    "a",
    " a b",
    "Hello, world!\n\tA second line.  Two spaces",
    "naïve 东京 \U0001f600 <s></s>",
)
"""Texts on which the tokenizer itself must agree with what transformers makes of it."""


def convert_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of `AutoTokenizer`, as one of the `tokenizers` library.

    A folder without tokenizer_config.json whose type of model transformers does not know has what
    its tokenizer.json says. Raises `ModelError` if a tokenizer cannot be read, or works in Python.
    """
    from transformers import AutoTokenizer

    try:
        with guard_transformers():
            # Never asked for on the terminal: whoever wants that code to run names it beforehand.
            loaded: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        tokenizer = loaded.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        with guard_transformers():
            wrong = [t for t in PROBES if loaded(t)["input_ids"] != tokenizer.encode(t).ids]
    except Exception as error:  # of any class: tokenizers raises bare ones
        alone = folder / "tokenizer.json"
        if alone.is_file() and not (folder / "tokenizer_config.json").is_file():
            return read_tokenizer_file(alone)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} has no tokenizer that can be read: {reason}; expected one that "
            "AutoTokenizer loads as a fast tokenizer"
        ) from None
    if wrong:
        raise ModelError(
            f"the tokenizer of {folder} gives other tokens in Python than by itself (for "
            f"{wrong[0]!r}), so that its tokens would not be the model's; save it as a fast "
            "tokenizer without code of its own"
        )
    return tokenizer
