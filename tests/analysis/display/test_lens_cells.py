"""A cell says what its map says; a search finds every place of a text, by the text of tokens."""

import json

import numpy as np
import pytest

import residua
from residua.analysis.display.lens_cells import plain_lens_map, read_lens_cell
from residua.analysis.display.lens_maps import MEASURES, CachePassage
from residua.analysis.display.passage_search import read_sequence_text, search_passages
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache


@pytest.fixture(scope="module")
def ridge(tiny_cache: ActivationCache) -> residua.RidgeProbe:
    return residua.RidgeProbe([0, 2]).fit(tiny_cache, keep=False)


@pytest.mark.parametrize("offset", [0, 2])
def test_a_cell_says_what_its_map_says(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe, offset: int
) -> None:
    passage = CachePassage(tiny_cache, 1, 2, 6)
    (entry,) = ridge.heatmap(passage, offsets=offset, track=7)
    (untracked,) = ridge.heatmap(passage, offsets=offset)
    for row, layer in enumerate(entry.layers):
        for column in range(len(entry.tokens)):
            place = CachePassage(tiny_cache, 1, 2 + column)
            cell = read_lens_cell(ridge, place, layer=layer, offset=offset, track=7)
            assert [token.label for token in cell.top[:5]] == list(entry.top[row][column])
            assert [token.rank for token in cell.top] == list(range(1, 11))
            assert cell.token == entry.tokens[column]
            assert cell.model_top[0].label == entry.targets[column]
            assert cell.tracked is not None
            assert cell.tracked.rank == entry.values["rank"][row, column]
            expected = untracked.values["probability"][row, column]
            assert cell.top[0].probability == pytest.approx(expected, rel=1e-4)
            assert cell.kl == pytest.approx(entry.values["kl"][row, column], abs=1e-5)
            assert cell.entropy == pytest.approx(entry.values["entropy"][row, column], rel=1e-4)


def test_a_cell_that_cannot_be_is_refused(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    with pytest.raises(NotFoundError, match="layer 99"):
        read_lens_cell(ridge, CachePassage(tiny_cache, 0), layer=99)
    length = int(tiny_cache.sequence_length[0])
    with pytest.raises(UsageError, match="no passage"):
        read_lens_cell(ridge, CachePassage(tiny_cache, 0, length), layer=1)
    with pytest.raises(UsageError, match="sequence"):
        read_lens_cell(ridge, CachePassage(tiny_cache), layer=1)
    with pytest.raises(UsageError, match="count"):
        read_lens_cell(ridge, CachePassage(tiny_cache, 0), layer=1, count=101)


def test_a_map_is_plain_json_and_undefined_numbers_are_null(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    (entry,) = ridge.heatmap(CachePassage(tiny_cache, 0, 0, 4))
    entry.values["kl"][0, 1] = np.nan
    value = json.loads(json.dumps(plain_lens_map(entry), allow_nan=False))
    assert value["values"]["kl"][0][1] is None
    for measure in MEASURES:
        kept = np.array(value["values"][measure], float)
        np.testing.assert_allclose(kept, entry.values[measure], rtol=1e-4)
    assert np.shape(value["top"])[:2] == entry.agrees.shape


def test_a_search_finds_every_place_of_a_text(tiny_cache: ActivationCache) -> None:
    tokenizer = tiny_cache.tokenizer()
    tokens = tiny_cache.tokens[:]
    first, length = int(tiny_cache.sequence_start[2]), int(tiny_cache.sequence_length[2])
    text = tokenizer.decode(tokens[first + 3 : first + 6].tolist(), skip_special_tokens=False)
    found = search_passages(tiny_cache, text.upper(), most=1000, seconds=60)
    assert found.searched == found.sequences == len(tiny_cache.sequence_length)
    mine = [match for match in found.matches if match.sequence == 2 and match.first == 3]
    assert len(mine) == 1
    assert mine[0].tokens == 3
    assert mine[0].matched.lower() == text.lower()
    for match in found.matches:
        start = int(tiny_cache.sequence_start[match.sequence]) + match.first
        ids = tokens[start : start + match.tokens].tolist()
        assert text.lower() in tokenizer.decode(ids, skip_special_tokens=False).lower()
    assert len(read_sequence_text(tiny_cache, 2)["tokens"]) == length


def test_a_search_ends_after_its_time_and_says_how_far_it_went(
    tiny_cache: ActivationCache,
) -> None:
    found = search_passages(tiny_cache, "no such words anywhere", seconds=0)
    assert found.matches == ()
    assert found.searched == 1 < found.sequences


@pytest.mark.parametrize("text", ["", "   ", "x" * 201])
def test_a_search_for_nothing_or_too_much_is_refused(
    tiny_cache: ActivationCache, text: str
) -> None:
    with pytest.raises(UsageError, match="letters to search"):
        search_passages(tiny_cache, text)
    with pytest.raises(UsageError, match="sequence"):
        read_sequence_text(tiny_cache, 10**6)
