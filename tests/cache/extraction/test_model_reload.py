"""The model of a cache is loaded again only if it is that model."""

from pathlib import Path

import pytest
import torch

from residua.cache.errors import MismatchError, ModelError
from residua.cache.extraction.model_reload import load_model_of
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import save_model


def test_the_model_that_the_cache_remembers_gives_its_rows(tiny_cache: ActivationCache) -> None:
    blocks = load_model_of(tiny_cache)
    assert (blocks.depth, blocks.d_model) == (tiny_cache.n_blocks, tiny_cache.d_model)
    ids = torch.from_numpy(tiny_cache.tokens[: tiny_cache.sequence_length[0]]).long()[None]
    with torch.inference_mode():
        for layer, hidden in enumerate(blocks.residuals(ids)):
            stored = torch.from_numpy(tiny_cache.residual_array(layer)[: ids.shape[1]])
            # float16 in the cache
            torch.testing.assert_close(hidden[0], stored, rtol=1e-3, atol=1e-3)


def test_a_folder_that_moved_can_be_named(
    tiny_cache: ActivationCache, model_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(model_folder)
    assert load_model_of(tiny_cache, str(moved)).depth == tiny_cache.n_blocks
    with pytest.raises(ModelError, match="say where the model is with --model"):
        load_model_of(tiny_cache, str(tmp_path / "gone"))


def test_another_model_is_refused(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match="is not the model of this cache"):
        load_model_of(tiny_cache, str(other))
