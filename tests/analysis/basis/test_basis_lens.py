"""The lens of a saved basis is found by its maps, under any name."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.analysis.basis.basis_lens import find_basis_maps
from residua.cache.errors import NotFoundError
from residua.cache.store.activation_cache import ActivationCache


def test_the_lens_of_a_basis_is_found_by_its_maps(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    lens = residua.RidgeProbe([0]).fit(tiny_cache, keep=False)
    basis = residua.CausalBasis(k=1, layers=[1], positions=64, test_positions=32)
    basis.fit(tiny_cache, lens, progress=None)

    other = residua.RidgeProbe([0], alphas=[1e9]).fit(tiny_cache, keep=False)
    other.save(tmp_path / "probes" / "another")
    with pytest.raises(NotFoundError, match="not under"):
        find_basis_maps(tiny_cache, basis, tmp_path)

    lens.save(tmp_path / "probes" / "renamed")
    maps = find_basis_maps(tiny_cache, basis, tmp_path)
    np.testing.assert_array_equal(maps[1].weight, lens.map(1, 0, None).weight.astype(np.float32))


def test_the_logit_lens_needs_no_probe(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    basis = residua.CausalBasis(k=1, layers=[1], positions=64, test_positions=32)
    basis.fit(tiny_cache, residua.LogitLens.of(tiny_cache, 0), progress=None)
    assert set(find_basis_maps(tiny_cache, basis, tmp_path)) == {1}
