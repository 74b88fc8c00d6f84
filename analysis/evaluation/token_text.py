"""The text of single tokens, from the tokenizer that a cache keeps."""

import re
from functools import cache
from typing import Any


def token_text(tokenizer: Any, token: int) -> str | None:
    """The text of a token, its leading space included; None if the tokenizer has no such token."""
    piece = tokenizer.id_to_token(int(token))
    if piece is None:
        return None
    text = tokenizer.decode([int(token)], skip_special_tokens=False)
    # SentencePiece decoders drop the space before the first word of a text.
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    return text or piece


def plain_texts(tokenizer: Any, vocab: int) -> list[str]:
    """Of all tokens, as they stand in a text: nothing for marks, `ing` for WordPiece's `##ing`."""
    added = tokenizer.get_added_tokens_decoder()
    marks = {token for token, kind in added.items() if kind.special}
    prefix = getattr(tokenizer.decoder, "prefix", "")
    texts = [token_text(tokenizer, token) or "" for token in range(vocab)]
    return ["" if n in marks else text.removeprefix(prefix) for n, text in enumerate(texts)]


def byte_text(piece: str) -> str | None:
    """The text of a token of single bytes; those that are no character are lone surrogates.

    Read off the token's `piece`: `<0xE2>` of SentencePiece, or letters that stand for bytes as in
    GPT-2. None for other pieces.
    """
    if found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
        raw = bytes.fromhex(found[1])
    elif all(letter in _bytes_of_letters() for letter in piece):
        raw = bytes(_bytes_of_letters()[letter] for letter in piece)
    else:
        return None
    return raw.decode("utf-8", "surrogateescape")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters of GPT-2's vocabulary for bytes: the byte itself, or the next from U+0100 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
