"""Special tokens around documents and contexts, and rows of token ids, as packed by hand."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from residua.cache.documents.documents import Documents
from residua.cache.errors import UsageError
from residua.cache.tokens.document_marks import BOS_POLICIES, choose_marks
from residua.cache.tokens.splits import assign_splits, ids_hash
from residua.cache.tokens.token_stream import TokenStream
from residua.cache.tokens.tokenization import tokenize

WORDS = 30
BOS, EOS, UNKNOWN = WORDS, WORDS + 1, WORDS + 2


def word_tokenizer(adds_bos: bool) -> Tokenizer:
    """A tokenizer whose token i is the word `w<i>`, with or without BOS before each text."""
    words = {f"w{i}": i for i in range(WORDS)} | {"[B]": BOS, "[E]": EOS, "[U]": UNKNOWN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="[B] $A", special_tokens=[("[B]", BOS)]
        )
    return tokenizer


class IdRows(Documents):
    """Documents that are rows of token ids; None is a missing row."""

    holds_token_ids = True

    def __init__(self, rows: list[list[int] | None]) -> None:
        super().__init__([""] * len(rows))
        self._rows = rows

    def token_ids(self, numbers: list[int]) -> list[np.ndarray | None]:
        rows = [self._rows[number] for number in numbers]
        return [None if row is None else np.array(row, np.int32) for row in rows]


def random_rows(seed: int, count: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, WORDS, int(n)).tolist() for n in rng.integers(1, 40, count)]


def as_documents(rows: list[list[int]]) -> Documents:
    return Documents([" ".join(f"w{i}" for i in row) for row in rows])


def stream_of(documents: Documents, adds_bos: bool = False, **options: Any) -> TokenStream:
    defaults = {"context": 16, "pack": True, "separator": BOS, "eos": EOS, "seed": 0}
    return tokenize(documents, word_tokenizer(adds_bos), **{**defaults, **options})


def pack_by_hand(
    documents: list[list[int]], splits: list[int], context: int, mark: int | None
) -> list[list[list[int]]]:
    """Sequences of each split: documents with their marks, joined and cut, with plain lists."""
    sequences: list[list[list[int]]] = []
    for split in range(3):
        tokens = [t for ids, s in zip(documents, splits, strict=True) if s == split for t in ids]
        cut: list[list[int]] = []
        while tokens:
            sequence = [mark] if mark is not None and tokens[0] != mark else []
            taken = context - len(sequence)
            cut.append([*sequence, *tokens[:taken]])  # pyright: ignore
            tokens = tokens[taken:]
        sequences.append(cut)
    return sequences


def sequences_by_split(stream: TokenStream) -> list[list[list[int]]]:
    numbers = [np.flatnonzero(stream.sequence_splits == split) for split in range(3)]
    return [[stream.sequence(int(n)).tolist() for n in split] for split in numbers]


def expected_marks(policy: str, adds_bos: bool, pack: bool) -> tuple[list[int], list[int]]:
    """Tokens before and after each document of text."""
    if policy == "none" or (policy == "auto" and not adds_bos and not pack):
        return [], []
    return [BOS], [EOS] if policy == "bos-eos" else []


@pytest.mark.parametrize("policy", BOS_POLICIES)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("context", [2, 3, 16, 1000])
def test_packed_documents_have_the_tokens_of_the_policy(
    policy: str, adds_bos: bool, context: int
) -> None:
    rows = random_rows(1)
    stream = stream_of(as_documents(rows), adds_bos, bos=policy, context=context)
    before, after = expected_marks(policy, adds_bos, pack=True)
    order = np.random.default_rng(0).permutation(len(rows))
    by_row = dict(zip(range(len(rows)), _splits_of_texts(rows), strict=True))
    documents = [[*before, *rows[n], *after] for n in order]
    mark = BOS if policy == "context" else None
    want = pack_by_hand(documents, [by_row[int(n)] for n in order], context, mark)
    assert sequences_by_split(stream) == want
    if policy == "context":
        assert {sequence[0] for split in want for sequence in split} == {BOS}
    # Added tokens span no characters.
    ids = stream.ids[:]
    stops, starts = (stream.token_arrays[f"tokens/char_{n}"][:] for n in ("stop", "start"))
    np.testing.assert_array_equal(stops == starts, (ids == BOS) | (ids == EOS))


def _splits_of_texts(rows: list[list[int]]) -> list[int]:
    from residua.cache.tokens.splits import text_hash

    hashes = [text_hash(" ".join(f"w{i}" for i in row)) for row in rows]
    distinct = np.unique(np.array(hashes, np.uint64))
    split_of = dict(zip(distinct.tolist(), assign_splits(distinct).tolist(), strict=True))
    return [split_of[value] for value in hashes]


@pytest.mark.parametrize("policy", BOS_POLICIES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_documents_that_are_not_packed_have_them_too(policy: str, adds_bos: bool) -> None:
    rows = random_rows(2)
    stream = stream_of(as_documents(rows), adds_bos, bos=policy, pack=False)
    before, after = expected_marks(policy, adds_bos, pack=False)
    for number, row in enumerate(stream.row_ids.tolist()):
        assert stream.sequence(number).tolist() == [*before, *rows[row], *after][:16]


@pytest.mark.parametrize("max_tokens", [16, 17, 40, 100, 500, 1000, 10**6])
def test_fewer_tokens_are_the_first_contexts_of_each_split(max_tokens: int) -> None:
    documents = as_documents(random_rows(3))
    whole = stream_of(documents, bos="context")
    some = stream_of(documents, bos="context", max_tokens=max_tokens)
    for kept, every in zip(sequences_by_split(some), sequences_by_split(whole), strict=True):
        assert kept == every[: len(kept)]
    assert some.positions <= max_tokens
    assert len(some.lengths) == len(whole.lengths) or some.positions + 16 > max_tokens


@pytest.mark.parametrize("policy", BOS_POLICIES)
def test_a_long_document_has_the_tokens_of_a_short_one(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = as_documents(random_rows(4, 20))
    want = stream_of(documents, True, bos=policy).digests()[0]
    monkeypatch.setattr("residua.cache.tokens.tokenization.LONG_DOCUMENT", 20)
    assert stream_of(documents, True, bos=policy).digests()[0] == want


@pytest.mark.parametrize("policy", BOS_POLICIES)
def test_rows_of_token_ids_are_taken_as_they_are(policy: str) -> None:
    rows: list[list[int] | None] = [*random_rows(5), [], None]
    documents = IdRows(rows)
    stream = stream_of(documents, True, bos=policy)
    before = [] if policy in ("auto", "none") else [BOS]
    after = [EOS] if policy == "bos-eos" else []
    order = [n for n in np.random.default_rng(0).permutation(len(rows)) if rows[n]]
    hashes = np.array([ids_hash(np.array(rows[n], np.int32)) for n in order], np.uint64)
    distinct = np.unique(hashes)
    split_of = dict(zip(distinct.tolist(), assign_splits(distinct).tolist(), strict=True))
    want = pack_by_hand(
        [[*before, *(rows[n] or ()), *after] for n in order],
        [split_of[value] for value in hashes.tolist()],
        16,
        BOS if policy == "context" else None,
    )
    assert sequences_by_split(stream) == want
    dropped = {reason: entry.documents for reason, entry in documents.reading.dropped.items()}
    assert dropped == {"empty": 1, "missing": 1}
    assert stream.sequence_documents[0] in hashes


def test_texts_that_a_template_marked_get_no_further_tokens() -> None:
    documents = Documents(["[B] w1 w2", "[B] w3"])
    documents.is_rendered = True
    marks = choose_marks("auto", documents, word_tokenizer(True), pack=True, separator=BOS)
    assert (marks.adds_own, marks.before, marks.after, marks.context) == (False, (), (), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "often"}, "bos 'often' is unknown; choose one of auto, none"),
        ({"bos": "document", "separator": None}, "needs a tokenizer with a BOS or EOS token"),
        ({"bos": "context", "separator": None}, "needs a tokenizer with a BOS or EOS token"),
        ({"bos": "bos-eos", "eos": None}, "needs a tokenizer with a BOS and EOS token"),
        ({"bos": "context", "context": 1}, "leaves no room for text in a context of 1 token"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stream_of(as_documents(random_rows(6)), **options)
