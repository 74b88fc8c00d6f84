"""Readable labels of tokens for pictures and tables: no two texts have the same label."""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...cache.errors import ResiduaError, ResiduaWarning, UsageError
from ...cache.files.confined_files import read_confined
from ...cache.files.json_fields import parse_json_object
from ...cache.images.classifier_source import class_names_of
from .token_text import byte_text, token_text

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

UNDEFINED = "no token"
"""Label where logits are no distribution (NaN, +inf); no token's label has a space."""
JOINERS = "\u200c\u200d"
"""Invisible letters that shape their neighbours."""


class TokenNames:
    """Readable labels of token ids: `␣` for a space, `\\n` for a line break, `#7` if unknown.

    Different texts have different labels. Without a tokenizer that can be read, all labels are ids.
    In a cache of images they are the names of the classes, which logits have in place of tokens.
    """

    class_names: tuple[str, ...] = ()
    """Names of the classes by id, in a cache of images."""

    def __init__(self, cache: "ActivationCache") -> None:
        self.tokenizer: Any = None
        if cache.manifest.image_grid is not None:
            self.class_names = read_class_names(cache)
        elif (cache.path / "head" / "tokenizer.json").is_file():
            try:
                self.tokenizer = cache.tokenizer()
            except Exception as error:  # tokenizers raises bare Exception
                message = f"the cache's tokenizer.json cannot be read, tokens are ids: {error}"
                warnings.warn(message, ResiduaWarning, stacklevel=2)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> "TokenNames":
        """The labels of a tokenizer that belongs to no cache yet."""
        names = cls.__new__(cls)
        names.tokenizer = tokenizer
        return names

    def __call__(self, token: int) -> str:
        if token < 0:
            return UNDEFINED
        if token < len(self.class_names):
            return self.class_names[token]
        text = self._text(token)
        return f"#{int(token)}" if text is None else visible(text)

    def label_read_token(self, token: int) -> str:
        """Label of a token that the model read: like `self(token)`, of images the position."""
        return f"#{int(token)}" if self.class_names else self(token)

    def passage(self, tokens: Iterable[int]) -> str:
        """Printable text of several tokens in a row: like their labels, but spaces are spaces.

        Bytes of a character that several tokens share become that character. Without a tokenizer,
        the ids are separated by spaces.
        """
        if self.tokenizer is None:
            return " ".join(f"#{int(token)}" for token in tokens)
        texts = (self._text(token) for token in tokens)
        joined = "".join("\ufffd" if text is None else text for text in texts)
        joined = joined.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        return visible(joined).replace("␣", " ")

    def _text(self, token: int) -> str | None:
        """The text of a token, see `byte_text` for bytes; None if the tokenizer has no token."""
        if self.tokenizer is None or token < 0:
            return None
        text = token_text(self.tokenizer, token)
        if text is not None and "\ufffd" in text:
            text = byte_text(self.tokenizer.id_to_token(int(token))) or text
        return text


def token_of_text(text: str, tokenizer: Any, names: TokenNames) -> int:
    """The id of the one token that `text` is; raises `UsageError` for a text of several tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1 and text.startswith(" "):
        # A tokenizer of SentencePiece puts a space before a text: "the" is its token " the".
        without_space = tokenizer.encode(text[1:], add_special_tokens=False).ids
        if [names(token) for token in without_space] == [f"␣{text[1:]}"]:
            ids = without_space
    if len(ids) != 1:
        pieces = ", ".join(repr(names(token)) for token in ids) or "no token"
        raise UsageError(
            f"{text!r} is not one token of this model but {pieces}; track one of them, or another "
            'spelling (many tokens begin with a space: " Paris")'
        )
    return int(ids[0])


def read_class_names(cache: "ActivationCache") -> tuple[str, ...]:
    """Names of the classes of an image classifier, printable; `#7` where it names none."""
    names: tuple[str, ...] = ()
    with suppress(ResiduaError, OSError):
        raw = read_confined(cache.path, "head/config.json")
        names = class_names_of(parse_json_object(raw, cache.path / "head" / "config.json"))
    found = [visible(name).replace("␣", " ") for name in names[: cache.vocab]]
    return (*found, *(f"#{number}" for number in range(len(found), cache.vocab)))


def visible(text: str) -> str:
    """A printable label of `text` that no other text has.

    Spaces are `␣`; `\\` and invisible letters are escaped, as in Python. Joiners inside a word
    (U+200C in Persian, U+200D in emoji) are left alone. Bytes that are no character, see
    `byte_text`, are `\\<E2>`.
    """
    last = len(text) - 1
    return "".join(
        letter if letter in JOINERS and 0 < index < last else _visible_letter(letter)
        for index, letter in enumerate(text)
    )


def _visible_letter(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a lone surrogate: U+DC00 plus the byte
        return f"\\<{ord(letter) - 0xDC00:02X}>"
    if letter == " ":
        return "␣"
    if letter in "\\␣" or not letter.isprintable():
        return letter.encode("unicode_escape").decode()
    return letter
