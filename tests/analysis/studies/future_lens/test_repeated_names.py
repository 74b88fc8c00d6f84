"""Names of several tokens are found where they stand, and count if they occur again."""

import json
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.analysis.studies.future_lens.repeated_names import (
    find_repeated_names,
    masks_inside_names,
    read_names_mask,
)
from residua.cache.errors import DataError, NotFoundError, UsageError

from ....support.synthetic import make_cache, random_head

TEXTS = [
    "the cat saw Anna Karenina on the mat, and then Anna Karenina ran. Gregor sat there",
    "the dog met Gregor under the tree and Boris too; the house was big",
    "then Gregor and the Mat were red",
]


@pytest.fixture(scope="module")
def cache(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> residua.ActivationCache:
    folder = tmp_path_factory.mktemp("names")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    return residua.extract(
        str(model_folder), str(folder / "texts.jsonl"), root=folder, pack=False, progress=None
    )


def words_in(cache: residua.ActivationCache, mask: np.ndarray) -> list[str]:
    """Texts of the runs of tokens whose positions the mask continues."""
    tokenizer, tokens = cache.tokenizer(), cache.tokens[:]
    found, start = [], None
    for position, inside in enumerate([*mask.tolist(), False]):
        if inside and start is None:
            start = position
        if not inside and start is not None:
            found.append(tokenizer.decode(tokens[start : position + 1].tolist()).strip())
            start = None
    return sorted(found)


def test_a_name_of_two_words_is_one_name_and_repeats_in_its_document(
    cache: residua.ActivationCache,
) -> None:
    sequences = np.arange(3)
    found = find_repeated_names(cache, sequences, "document")
    assert words_in(cache, found.mask) == ["Anna Karenina", "Anna Karenina"]
    assert (found.names, found.occurrences, found.examples) == (1, 2, ("Anna Karenina",))


def test_names_of_several_documents_and_of_any_place(cache: residua.ActivationCache) -> None:
    sequences = np.arange(3)
    # Gregor begins a sentence in the first document, where nothing tells it from other words.
    assert words_in(cache, find_repeated_names(cache, sequences, "data").mask) == [
        "Gregor",
        "Gregor",
    ]
    anywhere = find_repeated_names(cache, sequences, "any")
    assert words_in(cache, anywhere.mask) == [
        "Anna Karenina",
        "Anna Karenina",
        "Boris",
        "Gregor",
        "Gregor",
        "Mat",
    ]
    of_gregor = [n for n in range(3) if "met" in cache.tokenizer().decode(text_of(cache, n))]
    alone = find_repeated_names(cache, np.array(of_gregor), "data")
    assert alone.occurrences == 0


def text_of(cache: residua.ActivationCache, sequence: int) -> list[int]:
    return cache.tokens[cache.positions_of(np.array([sequence]))].tolist()


def test_pairs_inside_a_name_have_all_their_tokens_in_it() -> None:
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 0], bool)
    masks = masks_inside_names(mask, (0, 1, 2, 3))
    for offset, found in masks.items():
        for target in range(8):
            between = mask[max(0, target - max(1, offset) + 1) : target + 1]
            expected = bool(between.all()) and len(between) == max(1, offset)
            assert bool(found[target]) == expected


def test_a_cache_without_words_and_unknown_options_are_refused(
    cache: residua.ActivationCache, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    ids = make_cache(tmp_path, [rng.normal(size=(9, 4))] * 2, [9], random_head(4, 7))
    with pytest.raises(UsageError, match="words can only be found"):
        find_repeated_names(ids, np.array([0]))
    with pytest.raises(UsageError, match="names must repeat in one of"):
        find_repeated_names(cache, np.array([0]), "book")
    np.save(tmp_path / "mask.npy", np.ones(3, bool))
    assert read_names_mask(tmp_path / "mask.npy").tolist() == [True] * 3
    with pytest.raises(NotFoundError, match="does not exist"):
        read_names_mask(tmp_path / "other.npy")
    # A header of a petabyte, without values: refused, not allocated.
    np.save(tmp_path / "small.npy", np.zeros(8, bool))
    raw = (tmp_path / "small.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(
        raw.replace(b"(8,), } " + b" " * 14, b"(1000000000000000,), }")
    )
    assert (tmp_path / "huge.npy").read_bytes() != raw
    with pytest.raises(DataError, match="no array of numpy"):
        read_names_mask(tmp_path / "huge.npy")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(DataError, match="no array of numpy"):
        read_names_mask(tmp_path / "text.npy")
    np.savez(tmp_path / "two.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(DataError, match="several arrays"):
        read_names_mask(tmp_path / "two.npz")
