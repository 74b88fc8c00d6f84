"""Tables of a stranger's cache: starts, lengths, ids and codes are checked before use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import CorruptError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.array_writer import write_table
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import context_blocks
from residua.cache.tokens.table_checks import check_extents, words_of_codes
from residua.cache.tokens.token_stream import KeptRuns

from ...support.synthetic import make_cache, random_head

LENGTHS = [20, 12, 30, 18]
VOCAB = 11


def small_cache(root: Path, runs: KeptRuns | None = None) -> ActivationCache:
    positions = sum(LENGTHS) if runs is None else int(runs.length.sum())
    layers = [np.random.default_rng(n).normal(size=(positions, 4)).astype("f4") for n in range(2)]
    return make_cache(root, layers, LENGTHS, random_head(4, VOCAB), runs=runs)


def with_table(cache: ActivationCache, name: str, values: Any) -> ActivationCache:
    """The cache with other numbers in the array `name`; checksums and record are right."""
    values = np.asarray(values, cache.array(name).dtype)
    path = cache.path / "journal" / "base.json"
    base = read_json(path)
    base["arrays"][name] = write_forged(cache.path / "arrays.zarr", name, values)
    write_json(path, base)
    return ActivationCache(cache.path)


def write_forged(store: Path, name: str, values: np.ndarray) -> dict[str, Any]:
    import shutil

    metadata = (store / name / "zarr.json").read_bytes()
    shutil.rmtree(store / name)
    record = write_table(store, name, values)
    assert (store / name / "zarr.json").read_bytes() == metadata
    return record


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sequences/length", [20, 12, 30, 2**31 - 1]),
        ("sequences/length", [20, 12, 30, 17]),
        ("sequences/length", [20, -12, 54, 18]),
        ("sequences/length", [20, 0, 42, 18]),
        ("sequences/start", [0, 20, 32, 61]),
        ("sequences/start", [-1, 20, 32, 62]),
        ("sequences/start", [0, 20, 32, 1 << 60]),
    ],
)
def test_sequences_follow_each_other(name: str, values: list[int], tmp_path: Path) -> None:
    cache = with_table(small_cache(tmp_path), name, values)
    for read in (lambda: cache.sequence_start, lambda: cache.sequence_length):
        with pytest.raises(CorruptError, match="do not follow each other"):
            read()
    with pytest.raises(CorruptError, match="do not follow each other"):
        cache.positions_of(cache.sequences("all"))


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_token_ids_lie_in_the_vocabulary(token: int, tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    ids = cache.tokens[:]
    ids[5] = token
    cache = with_table(cache, "tokens/ids", ids)
    assert len(cache.tokens[6:]) == len(ids) - 6
    for read in (lambda: cache.tokens[:], lambda: cache.tokens.take(np.array([0, 5]))):
        with pytest.raises(CorruptError, match=r"tokens/ids holds .* expected 0 to 10"):
            read()
    with pytest.raises(CorruptError, match="tokens/ids holds"):
        list(context_blocks(cache, cache.sequences("all")))


RUNS = KeptRuns(np.array([0, 1, 1, 3]), np.array([3, 0, 7, 17]), np.array([4, 2, 3, 1]))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sequences/context", [0, 1, 1, 4], "sequences/context holds"),
        ("sequences/context", [0, -1, 1, 3], "sequences/context holds"),
        ("sequences/context", [1, 0, 1, 3], "sequences/context decreases"),
        ("contexts/start", [0, 20, 32, 63], "do not follow each other"),
        ("contexts/length", [20, 12, 30, 2**31 - 1], "do not follow each other"),
        ("tokens/index", [3, 4, 5, 6, 0, 1, 7, 8, 9, 18], "tokens/index holds"),
        ("tokens/index", [-3, 4, 5, 6, 0, 1, 7, 8, 9, 17], "tokens/index holds"),
    ],
)
def test_contexts_hold_the_kept_tokens(
    name: str, values: list[int], message: str, tmp_path: Path
) -> None:
    whole = small_cache(tmp_path / "whole", RUNS)
    assert len(whole.following_tokens(np.arange(10))) == 10
    cache = with_table(small_cache(tmp_path / "forged", RUNS), name, values)
    with pytest.raises(CorruptError, match=message):
        cache.following_tokens(np.arange(10))


def test_extents_of_different_lengths_and_of_nothing_are_refused() -> None:
    for start, length in (([0], [1, 2]), ([], [])):
        with pytest.raises(CorruptError, match="starts"):
            check_extents(np.array(start, np.int64), np.array(length, np.int32), 1, "cache")


def test_words_of_codes_are_a_list_of_words() -> None:
    assert words_of_codes({"categories": ["a", "b"]}, "x") == ("a", "b")
    assert words_of_codes({}, "x") == ()
    for categories in ("ab", 3, [1], {"a": 1}, None, [["a"]]):
        with pytest.raises(CorruptError, match="no list of words"):
            words_of_codes({"categories": categories}, "x")
