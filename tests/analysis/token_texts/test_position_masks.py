"""Claims about masks of words and names: equal to the texts read letter by letter."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.analysis.token_texts import position_masks
from residua.analysis.token_texts.position_masks import name_mask, word_continuation_mask
from residua.analysis.token_texts.token_text import plain_texts
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

TEXTS = [
    "Yesterday Annalise met Tom. Vandermeer was late, and «Dr. Oppenheimer» too!\nHeading: "
    "Wonderful (Kowalczyk) said the 2nd time that McMurdo sat on the mat.",
    "Étienne naïvely saw the 東京 house; IBM and snake_case_name ran to Ångström x2.",
    'the cat sat. "Redfield and then Bluefield" was it\n- Treehouse\n\n# Underhill of Mathouse',
]
NAMES = {
    0: ("Annalise", "Tom", "Dr", "Kowalczyk", "McMurdo"),
    1: ("IBM", "Ångström"),
    2: ("Bluefield", "Mathouse"),
}
"""Capitalised words that begin no sentence, line or heading, by hand.

`Oppenheimer` comes after a full stop. `Ångström` begins with a character of two tokens.
"""


@pytest.fixture(scope="module", params=["one by one", "packed"])
def cache(request, tmp_path_factory, model_folder: Path) -> ActivationCache:
    folder = tmp_path_factory.mktemp("masks")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    packed = request.param == "packed"
    return residua.extract(
        str(model_folder),
        str(folder / "texts.jsonl"),
        root=folder,
        pack=packed,
        context=23 if packed else 128,
    )


def in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_" or unicodedata.category(letter).startswith("M")


def following_spans(cache: ActivationCache) -> list[tuple[int, int, int, int, int]]:
    """Position, document, end of its token, first and last character of the next, by sequence."""
    spans, found = cache.spans(np.arange(cache.positions)), []
    for start, length in zip(cache.sequence_start, cache.sequence_length, strict=True):
        for p in range(start, start + length - 1):
            if spans[p, 0] == spans[p + 1, 0] and spans[p + 1, 1] < spans[p + 1, 2]:
                found.append((int(p), *map(int, (spans[p, 0], spans[p, 2], *spans[p + 1, 1:]))))
    return found


def token_texts(cache: ActivationCache) -> list[str]:
    return plain_texts(cache.tokenizer(), cache.vocab)


def test_continued_words_are_those_of_the_text(cache):
    want = np.zeros(cache.positions, bool)
    pieces = token_texts(cache)
    for p, document, end, first, _ in following_spans(cache):
        text, spaced = TEXTS[document], pieces[cache.tokens[p + 1]].startswith(" ")
        inside = first < end or (0 < first == end and in_word(text[first - 1]))
        want[p] = inside and in_word(text[first]) and not spaced
    assert 0.3 < want.mean() < 0.95
    found = word_continuation_mask(cache)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, want)


def names_by_hand(cache: ActivationCache) -> np.ndarray:
    want = np.zeros(cache.positions, bool)
    for document, words in NAMES.items():
        for word in words:
            assert TEXTS[document].count(word) == 1
            begin = TEXTS[document].index(word)
            for p, of, end, first, _ in following_spans(cache):
                goes_on = begin < first < begin + len(word) or first == begin < end
                want[p] |= of == document and goes_on
    return want


def test_names_are_those_found_by_hand(cache):
    want, found = names_by_hand(cache), name_mask(cache)
    assert want.sum() > 20
    np.testing.assert_array_equal(found, want)
    assert not (found & ~word_continuation_mask(cache)).any()


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("of", [word_continuation_mask, name_mask])
def test_masks_do_not_depend_on_the_blocks(cache, monkeypatch, rows, of):
    whole = of(cache)
    monkeypatch.setattr(position_masks, "BLOCK_ROWS", rows)
    np.testing.assert_array_equal(of(cache), whole)


def test_a_mask_is_what_evaluation_takes(cache):
    mask = word_continuation_mask(cache)
    found = residua.evaluate(cache, split="all", offsets=(0, 2), where=mask)
    assert found.n == mask.sum()
    index = np.arange(cache.positions) - np.repeat(cache.sequence_start, cache.sequence_length)
    for offset in (0, 2):
        assert found.select("logit", offset)[0].n == (mask & (index >= offset)).sum()


def test_what_a_cache_lacks_is_named(tmp_path, model_folder, texts_file):
    rng = np.random.default_rng(0)
    bare = make_cache(tmp_path, [rng.normal(0, 1, (9, 8))] * 2, [4, 5], random_head(8, 31))
    with pytest.raises(UsageError, match="the characters that tokens came from and a tokenizer"):
        name_mask(bare)
    some = residua.extract(str(model_folder), str(texts_file), root=tmp_path, positions="last")
    with pytest.raises(UsageError, match="keeps all positions"):
        word_continuation_mask(some)


def test_token_texts_of_other_tokenizers_are_plain():
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pieces = {"[UNK]": 0, "play": 1, "##ing": 2, "#": 3}
    word = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    word.decoder = decoders.WordPiece()
    word.add_special_tokens([AddedToken("[CLS]", special=True)])
    assert plain_texts(word, 6) == ["[UNK]", "play", "ing", "#", "", ""]
    sentence = Tokenizer(models.BPE({"▁play": 0, "ing": 1, "<0xE6>": 2, "▁": 3}, []))
    sentence.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    assert plain_texts(sentence, 4) == [" play", "ing", "\ufffd", " "]


def test_the_command_line_knows_every_mask():
    from residua.analysis.console.options import MASKS

    assert tuple(position_masks.MASKS) == MASKS
