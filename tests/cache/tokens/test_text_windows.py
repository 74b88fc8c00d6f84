"""Tokens of long documents: the same window by window, in bounded memory, only as far as needed."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from residua.cache.documents.documents import Documents
from residua.cache.tokens import tokenization
from residua.cache.tokens.text_windows import encode_in_windows
from residua.cache.tokens.token_stream import TokenStream
from residua.cache.tokens.tokenization import tokenize

WORDS = (
    "the dog cat ran home naïve 东京 \U0001f600 12345 don't\n\n sat  on Über mat, (yes)! a".split(
        " "
    )
)


def mixed_text(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


@cache
def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([mixed_text(2000)], trainer)
    return tokenizer


@cache
def bpe_of_the_whole_text() -> Tokenizer:
    """Like Llama's: no split into words, spaces are letters, a prefix, BOS before and EOS after."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer: Any = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([mixed_text(300)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer: Any = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([mixed_text(2000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


@cache
def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([mixed_text(2000)], trainer)
    return tokenizer


TOKENIZERS = (byte_level_bpe, bpe_of_the_whole_text, word_piece, unigram)
TEXTS = {
    "words": mixed_text(2000),
    "one letter": "a" * 9_000,
    "two letters": "ab" * 4_000,
    "spaces": "dog" + " " * 4_000 + "\n cat" + " " * 4_000 + "dog",
    "digits": "1234567" * 900,
    "emoji": "\U0001f600" * 4_000,
    "no space": mixed_text(1500).replace(" ", ""),
}


@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEXTS)
def test_windows_give_the_tokens_of_the_whole_text(
    make_tokenizer: Callable[[], Tokenizer], name: str
) -> None:
    tokenizer, text = make_tokenizer(), TEXTS[name]
    whole = tokenizer.encode(text, add_special_tokens=False)
    parts = list(encode_in_windows(tokenizer, text, 1000))
    assert np.concatenate([ids for ids, _ in parts]).tolist() == whole.ids
    chars = np.concatenate([chars for _, chars in parts])
    assert [tuple(span) for span in chars.tolist()] == whole.offsets


def stream_of(documents: list[str], tokenizer: Tokenizer, **options: Any) -> TokenStream:
    defaults: dict[str, Any] = {"context": 100, "pack": True, "separator": None, "seed": 0}
    return tokenize(Documents(documents), tokenizer, **{**defaults, **options})


@pytest.mark.parametrize("make_tokenizer", TOKENIZERS[1:2])
@pytest.mark.parametrize(("pack", "format"), [(True, 2), (True, 1), (False, 2)])
@pytest.mark.parametrize("max_tokens", [None, 350, 1_000])
def test_a_stream_is_the_same_whether_documents_are_read_whole_or_in_windows(
    make_tokenizer: Callable[[], Tokenizer],
    pack: bool,
    max_tokens: int | None,
    format: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer()
    lengths = (5, 700, 40, 600, 8, 10, 1000, 3, 60, 1)
    for documents in ([mixed_text(n, n) for n in lengths], [mixed_text(1500)]):
        options: dict[str, Any] = {"pack": pack, "max_tokens": max_tokens, "version": format}
        whole = stream_of(documents, tokenizer, **options)
        with monkeypatch.context() as patch:
            patch.setattr(tokenization, "LONG_DOCUMENT", 2000)
            patch.setattr(tokenization, "ENCODED_CHARACTERS", 500)
            patch.setattr(
                tokenization,
                "encode_in_windows",
                lambda tokenizer, text: encode_in_windows(tokenizer, text, 1000),
            )
            parts = stream_of(documents, tokenizer, **options)
        assert parts.digests()[0] == whole.digests()[0]
        assert parts.cut_counts == whole.cut_counts
        for name, column in whole.token_arrays.items():
            assert np.array_equal(parts.token_arrays[name][:], column[:]), name


class CountingTokenizer:
    """A tokenizer that counts the characters it reads, and the most that it reads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.read = self.most = 0

    def encode(self, text: str, **options: Any) -> Any:
        self.read, self.most = self.read + len(text), max(self.most, len(text))
        return self.tokenizer.encode(text, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        size = sum(map(len, texts))
        self.read, self.most = self.read + size, max(self.most, size)
        return self.tokenizer.encode_batch(texts, **options)


def test_few_tokens_of_a_long_document_need_little_tokenizing() -> None:
    counting: Any = CountingTokenizer(byte_level_bpe())
    text = mixed_text(200_000)
    stream = stream_of([text], counting, max_tokens=2_000)
    assert stream.positions == 2_000
    assert counting.read < len(text) / 4


@pytest.mark.parametrize("documents", [[mixed_text(100_000)], [mixed_text(8_000)] * 15])
def test_no_more_than_a_bounded_text_is_tokenized_at_once(documents: list[str]) -> None:
    counting: Any = CountingTokenizer(byte_level_bpe())
    stream_of(documents, counting)
    assert counting.read > sum(map(len, documents))
    assert counting.most <= tokenization.ENCODED_CHARACTERS
