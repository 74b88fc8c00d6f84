"""The model's tokenizer as `AutoTokenizer` loads it, kept between runs by the digest of its files.

transformers applies tokenizer_config.json and the tokenizer's class over tokenizer.json, so only
transformers knows the final tokenizer. Loading takes seconds: the result is kept as JSON in the
user's cache folder, beside the digests of weight files (`weight_digests.py`). `ModelSource` calls
`load_tokenizer`; format 1 used `read_tokenizer_file`.
"""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, ResiduaError
from ..files.json_files import json_digest, read_json, write_json
from .config_check import check_config_readable, describe_error
from .transformers_guard import guard_transformers
from .weight_digests import memo_path, remembered_file_digests

if TYPE_CHECKING:
    from tokenizers import Tokenizer


PATTERNS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.py", "*.jinja")
"""Files of a model folder with an influence on the tokenizer."""
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Usual files of a tokenizer's vocabulary, in messages."""
SENTENCEPIECE_LIBRARIES = ("sentencepiece", "protobuf")
"""Distributions that transformers needs to convert a vocabulary of SentencePiece."""
MAX_MEMOS = 100
"""Largest number of stored tokenizers."""


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of the model in `folder`, without truncation and padding.

    Raises `ModelError` without a tokenizer, or if it is not one of the `tokenizers` library.
    """
    if not _has_vocabulary(folder):
        raise ModelError(
            f"{folder} has no tokenizer that can be read: no file holds a vocabulary; expected "
            f"{', '.join(VOCABULARY_FILES)} or the like: copy the files of the model's tokenizer "
            "into the folder, or save it there with save_pretrained"
        )
    path = _memo_path(folder, trust_remote_code)
    tokenizer = _read_memo(path)
    if tokenizer is None:
        tokenizer = convert_tokenizer(folder, trust_remote_code)
        without_length_limits(tokenizer)
        _write_memo(path, tokenizer)
    return without_length_limits(tokenizer)


def _has_vocabulary(folder: Path) -> bool:
    """Whether any file of the folder can hold a vocabulary, or code that makes one.

    Without one, transformers makes the empty tokenizer of the model's class, which finds no token.
    """
    settings = ("config.json", "generation_config.json", "tokenizer_config.json")
    settings += ("special_tokens_map.json", "added_tokens.json", "adapter_config.json")
    files = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return any(
        path.name not in settings and not path.name.endswith((".index.json", ".jinja"))
        for path in files
    )


def _names_code(folder: Path) -> bool:
    """Whether a configuration in the folder names Python code for the tokenizer."""
    for name in ("tokenizer_config.json", "config.json"):
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            classes = json.loads((folder / name).read_bytes()).get("auto_map")
            if classes and (not isinstance(classes, dict) or "AutoTokenizer" in classes):
                return True
    return False


def read_tokenizer_file(path: Path) -> "Tokenizer":
    """The tokenizer of a tokenizer.json alone, without tokenizer_config.json."""
    from tokenizers import Tokenizer

    try:
        return without_length_limits(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {error}") from None


def tokenizer_digest(tokenizer: "Tokenizer") -> str:
    """sha256 of the canonical JSON of the tokenizer."""
    return json_digest(json.loads(tokenizer.to_str()))


def without_length_limits(tokenizer: "Tokenizer") -> "Tokenizer":
    """`tokenizer` itself, with truncation and padding switched off."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _memo_path(folder: Path, trust_remote_code: bool) -> Path:
    """File of the kept tokenizer, named by `tokenizer_files_digest`."""
    name = f"{tokenizer_files_digest(folder, trust_remote_code)}.json"
    return memo_path().parent / "tokenizers" / name


def tokenizer_files_digest(folder: Path, trust_remote_code: bool) -> str:
    """sha256 of all that decides the tokenizer: the folder's files and the libraries' versions."""
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})
    identity = {
        "files": remembered_file_digests(path for path in files if path.is_file()),
        "code": trust_remote_code,
        "versions": [version("transformers"), version("tokenizers")],
    }
    return json_digest(identity)


def _read_memo(path: Path) -> "Tokenizer | None":
    """The kept tokenizer; None if the file is absent or unreadable."""
    from tokenizers import Tokenizer

    with suppress(ResiduaError, OSError):
        text = read_json(path).get("tokenizer")
        if isinstance(text, str):
            with suppress(Exception):  # tokenizers raises bare Exception
                return Tokenizer.from_str(text)
    return None


def _write_memo(path: Path, tokenizer: "Tokenizer") -> None:
    """Keep the tokenizer and delete the oldest ones; nothing is kept in a read-only folder."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        memos = sorted(path.parent.glob("*.json"), key=lambda memo: memo.stat().st_mtime)
        for memo in memos[: max(0, len(memos) + 1 - MAX_MEMOS)]:
            memo.unlink(missing_ok=True)
        write_json(path, {"tokenizer": tokenizer.to_str()})


SAMPLE_TEXTS = (
    "a",
    " a b",
    "Hello, world!\n\tA second line.  Two spaces",
    "naïve 东京 \U0001f600 <s></s>",
)
"""Texts for which transformers and the tokenizer alone must give the same ids."""


def convert_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of `AutoTokenizer`, converted to the `tokenizers` library.

    If transformers does not know the model type and the folder has no tokenizer_config.json, the
    tokenizer of tokenizer.json is returned. Raises `ModelError` if no tokenizer can be read, or if
    Python code of the tokenizer changes its ids.
    """
    from transformers import AutoTokenizer

    try:
        with guard_transformers():
            # With an explicit trust_remote_code, transformers does not ask on the terminal.
            loaded: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        tokenizer = loaded.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        with guard_transformers():
            differing = [
                text
                for text in SAMPLE_TEXTS
                if loaded(text)["input_ids"] != tokenizer.encode(text).ids
            ]
    except Exception as error:  # tokenizers raises bare Exception
        path = folder / "tokenizer.json"
        if path.is_file() and not (folder / "tokenizer_config.json").is_file():
            return read_tokenizer_file(path)
        if not trust_remote_code and _names_code(folder):
            raise ModelError(
                f"{folder} has no tokenizer that can be read: it is Python code that comes with "
                "the model, and did not run; read the code and, if you trust it, give "
                "--trust-remote-code (trust_remote_code=True), or save the tokenizer as "
                "tokenizer.json"
            ) from None
        if libraries := _missing_sentencepiece_libraries(folder):
            raise ModelError(
                f"{folder} has only a SentencePiece tokenizer, which takes libraries that are not "
                f"installed ({', '.join(libraries)}): pip install 'residua[sentencepiece]' brings "
                "them; or copy the model's tokenizer.json into the folder"
            ) from None
        check_config_readable(folder, trust_remote_code)  # AutoTokenizer reads it, too
        raise ModelError(
            f"{folder} has no tokenizer that can be read: {describe_error(error)}; expected one "
            "that AutoTokenizer loads as a fast tokenizer"
        ) from None
    added_tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.get_vocab(with_added_tokens=False).keys() <= added_tokens:
        raise ModelError(
            f"{folder} has no tokenizer that can be read: its vocabulary is empty; copy the files "
            "of the model's tokenizer into the folder, or save it there with save_pretrained"
        )
    if differing:
        raise ModelError(
            f"the tokenizer of {folder} gives other tokens in Python than by itself (for "
            f"{differing[0]!r}), so that its tokens would not be the model's; save it as a fast "
            "tokenizer without code of its own"
        )
    return tokenizer


def _missing_sentencepiece_libraries(folder: Path) -> list[str]:
    """Libraries that are not installed, and without which the folder's vocabulary is not read.

    Empty unless the folder's only vocabulary is a file of SentencePiece: a message of protobuf,
    whose first byte is 10. (Files of tiktoken, with the same names, are text.)
    """
    if (folder / "tokenizer.json").is_file():
        return []
    for path in folder.glob("*.model"):
        with suppress(OSError), path.open("rb") as file:
            if file.read(1) == b"\n":
                return [name for name in SENTENCEPIECE_LIBRARIES if not _is_installed(name)]
    return []


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
