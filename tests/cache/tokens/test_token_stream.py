"""Claims about the token stream: its digest, its tables, and splits that follow from hashes."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from residua.cache.documents.documents import Documents
from residua.cache.errors import DataError
from residua.cache.tokens.index_arrays import compute_index_arrays
from residua.cache.tokens.splits import SPLITS, assign_folds, assign_splits
from residua.cache.tokens.token_stream import KeptRuns, TokenStream, concatenate, from_sequences
from residua.cache.tokens.tokenization import tokenize

TRAIN, VALIDATION, TEST = range(3)


def hashes_with_shares(shares: list[float]) -> np.ndarray:
    """Hashes whose upper half is the given share of 2**32."""
    upper = (np.array(shares) * 2**32).astype(np.uint64)
    return (upper << np.uint64(32)) | np.arange(len(shares)).astype(np.uint64)


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def test_the_digest_is_sha256_over_all_that_decides_the_numbers_of_each_sequence():
    """The bytes are those specified in cache/README.md, *Tokens*."""
    ids = np.array([5, 6, 7, 1, 70000, 2], np.int32)
    stream = TokenStream(
        ids,
        np.array([3, 1, 2]),
        np.array([9, 9, 4]),
        {"tokens/row_id": np.array([9, 4, 4, 9, 4, 8])},
        splits=np.array([0, 2, 1], np.uint8),
        documents=np.array([11, 12, 2**63], np.uint64),
    )
    records = [
        struct.pack("<4Qq3i", 3, 0, 11, 1, 1, 5, 6, 7),
        struct.pack("<4Qi", 1, 2, 12, 0, 1),
        struct.pack("<4Qq2i", 2, 1, 2**63, 1, 1, 70000, 2),
    ]
    digests = [hashlib.sha256(record).digest() for record in records]
    whole, hashes = stream.digests()
    assert whole == hashlib.sha256(b"".join(digests)).hexdigest()
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [int.from_bytes(digest[:8], "little") for digest in digests]


def test_what_is_kept_of_a_sequence_is_part_of_its_hash():
    """Without the kept positions, a cache of other positions would answer the request."""
    stream = from_sequences([[5, 6, 7], [1, 2]])
    seen = set()
    for first, length in (([0, 0], [1, 1]), ([1, 0], [1, 1]), ([0, 0], [2, 1]), ([0, 1], [1, 1])):
        runs = KeptRuns(np.array([0, 1]), np.array(first), np.array(length))
        seen.add(tuple(stream.with_runs(runs).digests()[1].tolist()))
    assert len(seen) == 4
    document = int(stream.sequence_documents[0])
    split = int(stream.sequence_splits[0])
    record = struct.pack("<4QQqq3i", 3, split, document, 0, 1, 0, 2, 5, 6, 7)
    runs = KeptRuns(np.array([0]), np.array([0]), np.array([2]))
    digest = hashlib.sha256(record).digest()
    assert stream.with_runs(runs).digests()[1][0] == int.from_bytes(digest[:8], "little")


def test_format_1_hashes_lengths_and_ids():
    sequences = [[5, 6, 7], [1], [70000, 2], [5, 6, 7]]
    stream = replace(from_sequences(sequences), format=1)
    data = b"".join(
        struct.pack("<q", len(ids)) + struct.pack(f"<{len(ids)}i", *ids) for ids in sequences
    )
    whole, hashes = stream.digests()
    assert whole == hashlib.sha256(data).hexdigest()
    first = hashlib.sha256(struct.pack("<3i", 5, 6, 7)).digest()[:8]
    assert int(hashes[0]) == int(hashes[3]) == int.from_bytes(first, "little")
    np.testing.assert_array_equal(stream.sequence_splits, assign_splits(hashes))


def test_sequences_without_documents_are_documents_of_their_own():
    stream = from_sequences([[5, 6, 7], [1], [5, 6, 7]])
    first = hashlib.sha256(struct.pack("<3i", 5, 6, 7)).digest()[:8]
    documents = stream.sequence_documents
    assert int(documents[0]) == int(documents[2]) == int.from_bytes(first, "little")
    np.testing.assert_array_equal(stream.sequence_splits, assign_splits(documents))


def test_the_digest_knows_where_sequences_begin_and_their_order():
    digests = {
        from_sequences(sequences).digests()[0]
        for sequences in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]])
    }
    assert len(digests) == 4


def test_tables_say_where_every_position_is():
    lengths = [3, 1, 4]
    stream = TokenStream(
        np.arange(8, dtype=np.int32), np.array(lengths, np.int64), np.array([9, 4, 4])
    )
    hashes = stream.digests()[1]
    arrays = compute_index_arrays(stream, hashes)
    np.testing.assert_array_equal(arrays["tokens/sequence"][:], [0, 0, 0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(arrays["tokens/index"][:], [0, 1, 2, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(arrays["sequences/start"][:], [0, 3, 4])
    np.testing.assert_array_equal(arrays["sequences/length"][:], lengths)
    np.testing.assert_array_equal(arrays["sequences/row_id"][:], [9, 4, 4])
    np.testing.assert_array_equal(arrays["sequences/hash"][:], hashes)
    assert {name: values.dtype.name for name, values in arrays.items()} == {
        "tokens/ids": "int32",
        "tokens/sequence": "int32",
        "tokens/index": "int32",
        "sequences/row_id": "int64",
        "sequences/start": "int64",
        "sequences/length": "int32",
        "sequences/split": "uint8",
        "sequences/hash": "uint64",
        "sequences/document": "uint64",
    }
    assert "sequences/document" not in compute_index_arrays(replace(stream, format=1), hashes)
    np.testing.assert_array_equal(stream.sequence(2), [4, 5, 6, 7])


def test_splits_are_a_tenth_a_tenth_and_the_rest():
    splits = assign_splits(random_hashes(200_000))
    share = np.bincount(splits, minlength=3) / len(splits)
    # Three standard deviations of a tenth of 200 000 are 0.002.
    np.testing.assert_allclose(share, [0.8, 0.1, 0.1], atol=0.002)
    assert splits.dtype == np.uint8
    assert SPLITS == ("train", "validation", "test")


def test_a_split_is_decided_by_the_upper_half_of_the_hash():
    shares = [0.0, 0.05, 0.0999, 0.1001, 0.15, 0.1999, 0.2001, 0.5, 0.9999]
    np.testing.assert_array_equal(
        assign_splits(hashes_with_shares(shares)), [TEST] * 3 + [1] * 3 + [0] * 3
    )


def test_a_split_does_not_depend_on_the_other_sequences():
    hashes = random_hashes(1000)
    splits = assign_splits(hashes)
    more = np.concatenate([hashes, random_hashes(3000, seed=1)])
    np.testing.assert_array_equal(assign_splits(more)[:1000], splits)
    order = np.random.default_rng(2).permutation(1000)
    np.testing.assert_array_equal(assign_splits(hashes[order]), splits[order])


def test_equal_sequences_share_a_split():
    for seed in range(50):
        hashes = np.random.default_rng(seed).choice(random_hashes(8, seed), 40)
        splits = assign_splits(hashes)
        for one in np.unique(hashes):
            assert len(set(splits[hashes == one].tolist())) == 1


@pytest.mark.parametrize("count", [3, 4, 5, 10, 40])
def test_no_split_of_three_distinct_sequences_or_more_is_empty(count):
    for seed in range(300):
        splits = assign_splits(random_hashes(count, seed))
        assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}, seed


@pytest.mark.parametrize("shares", [
    [0.05, 0.06, 0.07], [0.05, 0.06, 0.15], [0.05, 0.15, 0.16], [0.15, 0.16, 0.17],
    [0.5, 0.6, 0.7], [0.05, 0.06, 0.5], [0.15, 0.16, 0.5], [0.05, 0.5, 0.6], [0.15, 0.5, 0.6],
    [0.05, 0.15, 0.5], [0.01, 0.02, 0.03, 0.04], [0.11, 0.12, 0.13, 0.14], [0.01, 0.02, 0.03, 0.12],
], ids=str)  # fmt: skip
def test_no_split_of_a_small_set_is_empty_whatever_its_hashes(shares):
    splits = assign_splits(hashes_with_shares(shares))
    assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}


def test_two_distinct_sequences_are_left_where_their_hashes_put_them():
    np.testing.assert_array_equal(assign_splits(hashes_with_shares([0.5, 0.6])), [TRAIN, TRAIN])
    np.testing.assert_array_equal(assign_splits(hashes_with_shares([0.05])), [TEST])


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_even_and_do_not_follow_the_splits(folds):
    hashes = random_hashes(100_000)
    numbers = assign_folds(hashes, folds)
    assert set(numbers.tolist()) == set(range(folds))
    for part in (slice(None), assign_splits(hashes) == TEST):
        share = np.bincount(numbers[part]) / len(numbers[part])
        np.testing.assert_allclose(share, 1 / folds, atol=0.02)


def test_a_fold_is_the_lower_half_of_the_hash_modulo_folds():
    hashes = random_hashes(100)
    want = [int(h) % 2**32 % 7 for h in hashes]
    np.testing.assert_array_equal(assign_folds(hashes, 7), want)


WORDS = 60
MARK, UNKNOWN = WORDS, WORDS + 1


def word_tokenizer(marked: bool = False) -> Tokenizer:
    """A tokenizer whose token i is the word `w<i>`; if `marked`, it puts MARK before every text."""
    words = {f"w{i}": i for i in range(WORDS)} | {"[S]": MARK, "[U]": UNKNOWN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if marked:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[S] $A", special_tokens=[("[S]", MARK)]
        )
    return tokenizer


def random_documents(seed: int, count: int = 300) -> tuple[list[str], list[list[int]]]:
    """Random texts, some of them empty, and their token ids."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, WORDS, int(n)).tolist() for n in rng.integers(0, 40, count)]
    ids[3] = []
    return [" ".join(f"w{i}" for i in document) for document in ids], ids


def tokenize_texts(texts: list[str], marked: bool = False, **options) -> TokenStream:
    """Token stream of `texts`, packed to 16 tokens unless `options` of `tokenize` differ."""
    defaults = {"context": 16, "pack": True, "separator": MARK, "seed": 0, "max_tokens": None}
    return tokenize(Documents(texts), word_tokenizer(marked), **{**defaults, **options})


def document_order(ids: list[list[int]], seed: int) -> list[int]:
    """Numbers of the documents with text, in the order of the stream."""
    order = np.random.default_rng(seed).permutation(len(ids)).tolist()
    return [number for number in order if ids[number]]


def expected_splits(texts: list[str]) -> list[int]:
    """Split of each document by the hash of its text; -1 for a document without text."""
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts if text.strip()]
    hashes = [int.from_bytes(digest, "little") for digest in digests]
    splits = iter(assign_splits(np.array(hashes, np.uint64)).tolist())
    return [next(splits) if text.strip() else -1 for text in texts]


def pack_by_hand(
    texts: list[str], ids: list[list[int]], seed: int, context: int = 16
) -> list[tuple[int, list[int], int]]:
    """(split, tokens, first document) of every sequence, packed with plain lists."""
    splits, sequences = expected_splits(texts), []
    pending: dict[int, list[tuple[int, int]]] = {split: [] for split in range(3)}
    for number in document_order(ids, seed):
        split = splits[number]
        pending[split] += [(token, number) for token in [MARK, *ids[number]]]
        while len(pending[split]) >= context:
            sequence, pending[split] = pending[split][:context], pending[split][context:]
            sequences.append((split, [token for token, _ in sequence], sequence[0][1]))
    for split in range(3):
        if pending[split]:
            sequence = pending[split]
            sequences.append((split, [token for token, _ in sequence], sequence[0][1]))
    return sequences


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("seed", "count"), [(0, 300), (7, 300), (3, 1500), (5, 12), (6, 3)])
def test_the_documents_of_each_split_are_packed_by_themselves(seed, count, marked):
    texts, ids = random_documents(seed, max(count, 4))
    stream = tokenize_texts(texts, marked, seed=seed)
    want = pack_by_hand(texts, ids, seed)
    assert [stream.sequence(n).tolist() for n in range(len(stream.lengths))] == [w[1] for w in want]
    assert stream.sequence_splits.tolist() == [w[0] for w in want]
    assert stream.row_ids.tolist() == [w[2] for w in want]
    hashes = [hashlib.sha256(texts[w[2]].encode()).digest()[:8] for w in want]
    assert stream.sequence_documents.tolist() == [int.from_bytes(h, "little") for h in hashes]
    assert set(stream.sequence_splits.tolist()) == {TRAIN, VALIDATION, TEST}
    assert stream.ids.dtype == np.int32


def test_no_document_is_in_two_splits_and_equal_ones_share_theirs():
    texts, _ = random_documents(8)
    texts = [*texts, *texts[:200]]
    stream = tokenize_texts(texts)
    splits: dict[str, set[int]] = {}
    rows, starts = stream.token_arrays["tokens/row_id"][:], stream.starts
    for number, split in enumerate(stream.sequence_splits.tolist()):
        start = int(starts[number])
        for row in np.unique(rows[start : start + int(stream.lengths[number])]).tolist():
            splits.setdefault(texts[row], set()).add(split)
    assert {len(found) for found in splits.values()} == {1}


def test_more_documents_move_none_to_another_split():
    texts, _ = random_documents(9, count=900)
    assert expected_splits(texts)[:500] == expected_splits(texts[:500])
    few, many = tokenize_texts(texts[:500]), tokenize_texts(texts)
    split_of = {}
    for stream in (few, many):
        owner = np.repeat(stream.sequence_splits, stream.lengths)
        for row, split in zip(stream.token_arrays["tokens/row_id"][:].tolist(), owner, strict=True):
            assert split_of.setdefault(row, split) == split


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_of_one_or_two_documents_the_end_is_held_out(copies, max_tokens):
    long = " ".join(f"w{i % WORDS}" for i in range(1000))
    other = " ".join(f"w{i % 7}" for i in range(300))
    for texts in ([long] * copies, [long, other] * copies):
        stream = tokenize_texts(texts, max_tokens=max_tokens)
        assert stream.split_by == "sequence"
        count = len(stream.lengths)
        tenth = max(1, round(count / 10))
        want = [TRAIN] * (count - 2 * tenth) + [VALIDATION] * tenth + [TEST] * tenth
        assert stream.sequence_splits.tolist() == want
        # Shortened, it is split anew: nothing is without a test split.
        short = stream.first_sequences(10)
        assert short.sequence_splits.tolist() == [TRAIN] * 8 + [VALIDATION, TEST]
    assert tokenize_texts([long], context=600).sequence_splits.tolist() == [TRAIN, TRAIN]
    assert tokenize_texts(random_documents(1)[0]).split_by == "document"


def test_format_1_packs_all_documents_together():
    texts, ids = random_documents(0)
    stream = tokenize_texts(texts, version=1)
    want = [token for number in document_order(ids, 0) for token in [MARK, *ids[number]]]
    assert stream.ids[:].tolist() == want
    assert set(stream.lengths[:-1].tolist()) == {16}
    for max_tokens in (16, 17, 100, 1000, len(want), len(want) - 1):
        some = tokenize_texts(texts, version=1, max_tokens=max_tokens)
        kept = len(want) if max_tokens >= len(want) else max_tokens // 16 * 16
        assert some.ids[:].tolist() == want[:kept]


def test_without_a_separator_documents_follow_each_other():
    texts, ids = random_documents(1)
    stream = tokenize_texts(texts, separator=None)
    order, splits = document_order(ids, 0), expected_splits(texts)
    for split in (TRAIN, VALIDATION, TEST):
        want = [token for number in order if splits[number] == split for token in ids[number]]
        numbers = np.flatnonzero(stream.sequence_splits == split)
        assert [t for n in numbers for t in stream.sequence(int(n)).tolist()] == want


def test_not_packed_there_is_one_sequence_per_document_cut_at_the_context():
    texts, ids = random_documents(3)
    stream = tokenize_texts(texts, pack=False)
    order = document_order(ids, 0)
    assert stream.row_ids.tolist() == order
    sequences = [stream.sequence(n).tolist() for n in range(len(order))]
    assert sequences == [ids[number][:16] for number in order]
    marked = tokenize_texts(texts, True, pack=False)
    assert marked.sequence(0).tolist() == [MARK, *ids[order[0]]][:16]


def sequences_by_split(stream: TokenStream) -> list[list[list[int]]]:
    """Token ids of the sequences of each split."""
    return [
        [stream.sequence(int(n)).tolist() for n in np.flatnonzero(stream.sequence_splits == split)]
        for split in range(3)
    ]


@pytest.mark.parametrize("max_tokens", [16, 17, 100, 1000, 10**6])
def test_not_packed_fewer_tokens_are_a_prefix_of_the_whole_stream(max_tokens):
    texts, _ = random_documents(4)
    whole, some = (tokenize_texts(texts, pack=False, max_tokens=n) for n in (None, max_tokens))
    count = len(some.lengths)
    assert some.positions <= max_tokens
    assert count == len(whole.lengths) or some.positions + whole.lengths[count] > max_tokens
    np.testing.assert_array_equal(some.ids[:], whole.ids[: some.positions])
    np.testing.assert_array_equal(some.lengths, whole.lengths[:count])
    np.testing.assert_array_equal(some.row_ids, whole.row_ids[:count])


@pytest.mark.parametrize("max_tokens", [16, 17, 40, 100, 500, 1000, 4000, 5910, 5911, 6000, 10**6])
@pytest.mark.parametrize("long", [False, True])
def test_packed_fewer_tokens_are_the_first_sequences_of_each_split(max_tokens, long):
    texts, ids = random_documents(4)
    if long:  # one document, which comes early, is longer than all others together
        first = document_order(ids, 0)[2]
        texts[first] = " ".join(f"w{i % WORDS}" for i in range(9000))
    whole, some = (tokenize_texts(texts, max_tokens=n) for n in (None, max_tokens))
    count, possible = len(some.lengths), max_tokens // 16
    for kept, every in zip(sequences_by_split(some), sequences_by_split(whole), strict=True):
        assert kept == every[: len(kept)]
        if possible >= 3:
            assert len(kept) >= min(len(every), max(1, round(possible / 10)))
    assert some.positions <= max_tokens
    # Nothing is left out that would fit.
    assert count == len(whole.lengths) or some.positions + 16 > max_tokens
    if max_tokens >= whole.positions:
        assert sorted(some.digests()[1].tolist()) == sorted(whole.digests()[1].tolist())


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_how_many_documents_are_read_at_once_changes_nothing(rows, monkeypatch):
    texts, _ = random_documents(11, count=500)
    want = [tokenize_texts(texts, max_tokens=n).digests()[0] for n in (None, 900, 4000)]
    monkeypatch.setattr("residua.cache.documents.documents.READ_ROWS", rows)
    assert [tokenize_texts(texts, max_tokens=n).digests()[0] for n in (None, 900, 4000)] == want


def test_the_seed_decides_the_order():
    texts, _ = random_documents(5)
    digests = [tokenize_texts(texts, seed=seed).digests()[0] for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_data_without_text_are_an_error(texts):
    with pytest.raises(DataError, match=rf"the data hold no text \({len(texts)} documents\)"):
        tokenize_texts(texts)


def test_too_few_tokens_for_a_sequence_are_an_error():
    with pytest.raises(DataError, match="max_tokens=5 is less than one sequence"):
        tokenize_texts(random_documents(6)[0], max_tokens=5)


def test_progress_ends_with_all_documents():
    texts, _ = random_documents(7, count=600)
    seen: list[tuple[int, int]] = []
    tokenize_texts(texts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


KIND = "sequences/labels/kind"


def test_labels_whose_codes_mean_other_words_are_joined_by_their_words() -> None:
    one, other = (
        replace(
            from_sequences([[1, 2], [3]]),
            sequence_arrays={KIND: np.array([0, 1]), "sequences/grade": np.array([5, 6])},
            categories={KIND: words},
        )
        for words in (("a", "b"), ("b", "a"))
    )
    assert set(concatenate(one, one).sequence_arrays) == {KIND, "sequences/grade"}
    found = concatenate(one, other)
    words = np.array(found.categories[KIND])[found.sequence_arrays[KIND]]
    assert words.tolist() == ["a", "b", "b", "a"]
