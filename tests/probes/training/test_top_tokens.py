"""Top tokens are those of the head, at the positions of the given sequences only."""

from pathlib import Path

import numpy as np
import pytest

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training import top_tokens as top_tokens
from residua.probes.training.top_tokens import find_top_tokens, tokens_at

from ...support.synthetic import make_cache, random_head


@pytest.fixture
def small_cache(tmp_path: Path) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 50).tolist()
    layers = [rng.normal(size=(sum(lengths), 6)) for _ in range(2)]
    return make_cache(tmp_path, layers, lengths, random_head(6, 11))


@pytest.mark.parametrize("rows", [7, 1000])
def test_top_tokens_are_those_of_the_head(
    small_cache: ActivationCache, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_tokens, "TILE_BYTES", 0)
    monkeypatch.setattr(top_tokens, "TILE_ROWS", rows)
    rows_done: list[int] = []
    sequences = small_cache.sequences("train")
    labels = find_top_tokens(small_cache, sequences, rows_done.append)
    expected = small_cache.head.logits(small_cache.residual_array(small_cache.n_blocks)[:]).argmax(
        -1
    )
    inside = np.zeros(small_cache.positions, bool)
    inside[small_cache.positions_of(sequences)] = True
    assert sum(rows_done) == inside.sum()
    positions = np.arange(small_cache.positions + 3)
    tokens = tokens_at(labels, positions).numpy()
    np.testing.assert_array_equal(tokens[: small_cache.positions], np.where(inside, expected, -1))
    assert (tokens[small_cache.positions :] == -1).all()


def test_nothing_is_left_in_the_folder_of_temporary_files(
    small_cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    labels = find_top_tokens(small_cache, small_cache.sequences("train"))
    assert not list(folder.iterdir())
    assert labels.any()
