"""Top tokens are the head's, for the asked sequences alone."""

from pathlib import Path

import numpy as np
import pytest

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training import top_tokens as tops
from residua.probes.training.top_tokens import find_top_tokens, tokens_at

from ...support.synthetic import make_cache, random_head


@pytest.fixture
def tiny(tmp_path: Path) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 50).tolist()
    layers = [rng.normal(size=(sum(lengths), 6)) for _ in range(2)]
    return make_cache(tmp_path, layers, lengths, random_head(6, 11))


@pytest.mark.parametrize("rows", [7, 1000])
def test_they_are_those_of_the_head(
    tiny: ActivationCache, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tops, "TILE_BYTES", 0)
    monkeypatch.setattr(tops, "TILE_ROWS", rows)
    seen: list[int] = []
    chosen = tiny.sequences("train")
    found = find_top_tokens(tiny, chosen, seen.append)
    expected = tiny.head.logits(tiny.residual_array(tiny.n_blocks)[:]).argmax(-1)
    inside = np.zeros(tiny.positions, bool)
    inside[tiny.positions_of(chosen)] = True
    assert sum(seen) == inside.sum()
    every = np.arange(tiny.positions + 3)
    read = tokens_at(found, every).numpy()
    np.testing.assert_array_equal(read[: tiny.positions], np.where(inside, expected, -1))
    assert (read[tiny.positions :] == -1).all()


def test_nothing_is_left_in_the_folder_of_temporary_files(
    tiny: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    found = find_top_tokens(tiny, tiny.sequences("train"))
    assert not list(folder.iterdir())
    assert found.any()
