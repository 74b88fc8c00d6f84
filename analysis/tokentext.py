"""The text of single tokens, from the tokenizer that a cache keeps."""

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
