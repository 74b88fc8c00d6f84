"""Special tokens around documents, and at the start of contexts: BOS, EOS and those of tokenizers.

`choose_marks` turns a policy of `BOS_POLICIES` into the tokens to add; `tokenize` adds them. The
policy is part of a cache's identity, and the tokenizer decides the rest:

auto      what the tokenizer adds around a text; if it begins texts with no token of its own, the
          BOS or EOS token before each packed document. Nothing around rows of token ids, and
          around conversations, whose template writes the special tokens.
none      no special token
document  a BOS (else EOS) token before every document, packed or not
context   as `document`, and every packed context begins with that token
bos-eos   the BOS token before and the EOS token after every document
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..documents.documents import Documents
from ..errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS_POLICIES = ("auto", "none", "document", "context", "bos-eos")


@dataclass(frozen=True)
class DocumentMarks:
    """Tokens that are added to documents and contexts."""

    adds_own: bool = True
    """Whether the tokenizer adds its own special tokens to each text."""
    before: tuple[int, ...] = ()
    """Ids before each document, before those of the tokenizer."""
    after: tuple[int, ...] = ()
    """Ids after each document."""
    context: int | None = None
    """Id with which every packed context begins."""


def choose_marks(
    policy: str,
    documents: Documents,
    tokenizer: "Tokenizer",
    *,
    pack: bool,
    separator: int | None,
    eos: int | None = None,
) -> DocumentMarks:
    """The tokens that `policy` adds to `documents`.

    `separator` is the id of the tokenizer's BOS token, else of its EOS token, `eos` that of the EOS
    token; None without them. Raises `UsageError` if a token that the policy adds does not exist.
    """
    if policy not in BOS_POLICIES:
        raise UsageError(f"bos {policy!r} is unknown; choose one of {', '.join(BOS_POLICIES)}")
    # Token ids are final, and a chat template writes the special tokens into the text.
    is_marked = documents.holds_token_ids or documents.is_rendered
    if policy == "none" or (policy == "auto" and is_marked):
        return DocumentMarks(adds_own=False)

    # A separator is added only if the tokenizer begins texts with no mark of its own.
    with_own = tokenizer.encode("a").ids
    adds_mark = with_own[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]
    if policy == "auto":
        is_needed = pack and not adds_mark and separator is not None
        return DocumentMarks(before=(separator,) if is_needed and separator is not None else ())

    mark = with_own[0] if adds_mark else separator
    if mark is None or (policy == "bos-eos" and eos is None):
        missing = "BOS and EOS token" if policy == "bos-eos" else "BOS or EOS token"
        raise UsageError(
            f"bos {policy!r} needs a tokenizer with a {missing}, which the model's files do not "
            "name; choose auto or none"
        )
    if policy == "bos-eos":
        assert eos is not None
        return DocumentMarks(adds_own=False, before=(mark,), after=(eos,))
    context = mark if policy == "context" and pack else None
    if is_marked:
        return DocumentMarks(adds_own=False, before=(mark,), context=context)
    return DocumentMarks(before=() if adds_mark else (mark,), context=context)
