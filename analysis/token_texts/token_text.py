"""The text of single tokens, from the tokenizer that a cache keeps.

heatmap.py labels cells with `token_text` and `byte_text`; position_masks.py finds words in
`plain_texts`.
"""

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
    """The text of every token id below `vocab`, without the tokenizer's own marks.

    Special tokens are empty; WordPiece's `##ing` is `ing`.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {token for token, added_token in added.items() if added_token.special}
    prefix = getattr(tokenizer.decoder, "prefix", "")
    texts = [token_text(tokenizer, token) or "" for token in range(vocab)]
    return ["" if n in special else text.removeprefix(prefix) for n, text in enumerate(texts)]


def byte_text(piece: str) -> str | None:
    """The text of a token that stands for raw bytes; None for other tokens.

    `piece` is `<0xE2>` of SentencePiece, or letters that stand for bytes as in GPT-2. Bytes that
    are no UTF-8 character become lone surrogates (`surrogateescape`).
    """
    byte_of_letter = _byte_of_letter()
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
        raw = bytes.fromhex(match[1])
    elif all(letter in byte_of_letter for letter in piece):
        raw = bytes(byte_of_letter[letter] for letter in piece)
    else:
        return None
    return raw.decode("utf-8", "surrogateescape")


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte of each letter in GPT-2's vocabulary.

    Printable bytes are their own letter; the others take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    own_letters = {chr(byte): byte for byte in printable}
    return own_letters | {chr(256 + number): byte for number, byte in enumerate(unprintable)}
