"""Claims about the token stream: its digest, its tables, and splits that follow from hashes."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from residua.cache.documents import Documents
from residua.cache.encode import tokenize
from residua.cache.errors import DataError
from residua.cache.store import SPLITS
from residua.cache.tables import tables
from residua.cache.tokens import (
    TokenStream,
    assign_splits,
    concatenate,
    folds_of,
    from_sequences,
)

TRAIN, VALIDATION, TEST = range(3)


def hashes_of(shares: list[float]) -> np.ndarray:
    """Hashes whose upper half is the given share of 2**32."""
    upper = (np.array(shares) * 2**32).astype(np.uint64)
    return (upper << np.uint64(32)) | np.arange(len(shares)).astype(np.uint64)


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def test_the_digest_is_sha256_over_lengths_and_ids():
    stream = from_sequences([[5, 6, 7], [1], [70000, 2]])
    data = b"".join(
        struct.pack("<q", len(ids)) + struct.pack(f"<{len(ids)}i", *ids)
        for ids in ([5, 6, 7], [1], [70000, 2])
    )
    assert stream.digests()[0] == hashlib.sha256(data).hexdigest()


def test_a_sequence_is_hashed_by_its_ids_alone():
    hashes = from_sequences([[5, 6, 7], [1], [5, 6, 7]]).digests()[1]
    first = hashlib.sha256(struct.pack("<3i", 5, 6, 7)).digest()[:8]
    assert hashes.dtype == np.uint64
    assert int(hashes[0]) == int(hashes[2]) == int.from_bytes(first, "little")
    assert hashes[0] != hashes[1]


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
    arrays = tables(stream, hashes)
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
    }
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
    np.testing.assert_array_equal(assign_splits(hashes_of(shares)), [TEST] * 3 + [1] * 3 + [0] * 3)


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
    splits = assign_splits(hashes_of(shares))
    assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}


def test_two_distinct_sequences_are_left_where_their_hashes_put_them():
    np.testing.assert_array_equal(assign_splits(hashes_of([0.5, 0.6])), [TRAIN, TRAIN])
    np.testing.assert_array_equal(assign_splits(hashes_of([0.05])), [TEST])


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_even_and_do_not_follow_the_splits(folds):
    hashes = random_hashes(100_000)
    numbers = folds_of(hashes, folds)
    assert set(numbers.tolist()) == set(range(folds))
    for part in (slice(None), assign_splits(hashes) == TEST):
        share = np.bincount(numbers[part]) / len(numbers[part])
        np.testing.assert_allclose(share, 1 / folds, atol=0.02)


def test_a_fold_is_the_lower_half_of_the_hash_modulo_folds():
    hashes = random_hashes(100)
    want = [int(h) % 2**32 % 7 for h in hashes]
    np.testing.assert_array_equal(folds_of(hashes, 7), want)


WORDS = 60
MARK, UNKNOWN = WORDS, WORDS + 1


def word_tokenizer(marked: bool = False) -> Tokenizer:
    """Token i is the word `w<i>`; `marked` ones put MARK before every text by themselves."""
    words = {f"w{i}": i for i in range(WORDS)} | {"[S]": MARK, "[U]": UNKNOWN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if marked:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[S] $A", special_tokens=[("[S]", MARK)]
        )
    return tokenizer


def documents_of(seed: int, count: int = 300) -> tuple[list[str], list[list[int]]]:
    """Texts, some of them empty, and their token ids."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, WORDS, int(n)).tolist() for n in rng.integers(0, 40, count)]
    ids[3] = []
    return [" ".join(f"w{i}" for i in document) for document in ids], ids


def stream_of(texts: list[str], marked: bool = False, **options) -> TokenStream:
    defaults = {"context": 16, "pack": True, "separator": MARK, "seed": 0, "max_tokens": None}
    return tokenize(Documents(texts), word_tokenizer(marked), **{**defaults, **options})


def permuted(ids: list[list[int]], seed: int) -> list[int]:
    """Numbers of the documents that hold text, in the order of the stream."""
    order = np.random.default_rng(seed).permutation(len(ids)).tolist()
    return [number for number in order if ids[number]]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
def test_packing_keeps_every_token_of_the_permuted_documents(seed, marked):
    texts, ids = documents_of(seed)
    stream = stream_of(texts, marked, seed=seed)
    want = [token for number in permuted(ids, seed) for token in [MARK, *ids[number]]]
    assert stream.ids[:].tolist() == want
    assert stream.ids.dtype == np.int32
    assert set(stream.lengths[:-1].tolist()) == {16}
    assert 1 <= stream.lengths[-1] <= 16
    assert stream.positions == len(want)


def test_without_a_separator_documents_follow_each_other():
    texts, ids = documents_of(1)
    want = [token for number in permuted(ids, 0) for token in ids[number]]
    assert stream_of(texts, separator=None).ids[:].tolist() == want


def test_a_row_id_names_the_document_in_which_its_sequence_begins():
    texts, ids = documents_of(2)
    stream = stream_of(texts)
    owners = [number for number in permuted(ids, 0) for _ in range(len(ids[number]) + 1)]
    assert stream.row_ids.tolist() == [owners[start] for start in stream.starts]


def test_not_packed_there_is_one_sequence_per_document_cut_at_the_context():
    texts, ids = documents_of(3)
    stream = stream_of(texts, pack=False)
    order = permuted(ids, 0)
    assert stream.row_ids.tolist() == order
    sequences = [stream.sequence(n).tolist() for n in range(len(order))]
    assert sequences == [ids[number][:16] for number in order]
    marked = stream_of(texts, True, pack=False)
    assert marked.sequence(0).tolist() == [MARK, *ids[order[0]]][:16]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("max_tokens", [16, 17, 100, 1000, 10**6])
def test_fewer_tokens_are_a_prefix_of_the_whole_stream(pack, max_tokens):
    texts, _ = documents_of(4)
    whole, some = (stream_of(texts, pack=pack, max_tokens=n) for n in (None, max_tokens))
    count = len(some.lengths)
    assert some.positions <= max_tokens
    assert count == len(whole.lengths) or some.positions + whole.lengths[count] > max_tokens
    np.testing.assert_array_equal(some.ids[:], whole.ids[: some.positions])
    np.testing.assert_array_equal(some.lengths, whole.lengths[:count])
    np.testing.assert_array_equal(some.row_ids, whole.row_ids[:count])


def test_the_seed_decides_the_order():
    texts, _ = documents_of(5)
    digests = [stream_of(texts, seed=seed).digests()[0] for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_data_without_text_are_an_error(texts):
    with pytest.raises(DataError, match=rf"the data hold no text \({len(texts)} documents\)"):
        stream_of(texts)


def test_too_few_tokens_for_a_sequence_are_an_error():
    with pytest.raises(DataError, match="max_tokens=5 is less than one sequence"):
        stream_of(documents_of(6)[0], max_tokens=5)


def test_progress_ends_with_all_documents():
    texts, _ = documents_of(7, count=600)
    seen: list[tuple[int, int]] = []
    stream_of(texts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_labels_whose_codes_mean_other_words_are_not_joined() -> None:
    one, other = (
        replace(
            from_sequences([[1, 2], [3]]),
            of_sequences={"sequences/kind": np.array([0, 1]), "sequences/grade": np.array([5, 6])},
            categories={"sequences/kind": words},
        )
        for words in (("a", "b"), ("b", "a"))
    )
    assert set(concatenate(one, one).of_sequences) == {"sequences/kind", "sequences/grade"}
    found = concatenate(one, other)
    assert set(found.of_sequences) == {"sequences/grade"}
    assert not found.categories
