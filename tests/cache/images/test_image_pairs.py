"""Positions of an image are in no pair with each other, and no text follows them."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.cache.errors import UsageError
from residua.cache.tokens.segments import (
    PairScope,
    context_blocks,
    has_document_borders,
    neighbour_tokens,
    segment_indices,
)
from residua.probes.base.resampling import ResamplingUnits

from ...support.images import save_classifier, save_pictures

TOKENS = 17


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> residua.ActivationCache:
    folder = tmp_path_factory.mktemp("pairs")
    model, pictures = save_classifier(folder / "vit"), save_pictures(folder / "pictures", 3)
    return residua.extract(str(model), str(pictures), root=folder / "root")


def test_every_position_is_a_segment_by_itself(images: residua.ActivationCache) -> None:
    sequences = images.sequences("all")
    index, followers = segment_indices(images, sequences)
    assert not index.any()
    assert not followers.any()
    across, _ = segment_indices(images, sequences, across_documents=True)
    np.testing.assert_array_equal(across, images.tokens[:])
    assert set(PairScope().largest_offsets(images, sequences)) == {0}
    assert has_document_borders(images)
    for step in (1, -1):
        for across_documents in (False, True):
            found = neighbour_tokens(images, np.arange(40), step, across_documents)
            assert set(found) == {-1}
    with pytest.raises(UsageError, match="of images"):
        next(context_blocks(images, np.arange(2)))


def test_intervals_resample_images(images: residua.ActivationCache) -> None:
    units = ResamplingUnits.of(images, images.sequences("all"), 0)
    assert (units.name, units.count) == ("image", 9)
    assert "only 9 images" in units.note
    assert sorted(np.bincount(units.unit_numbers)) == [TOKENS] * 9


def test_moments_kept_of_pairs_inside_positions_do_not_serve_pairs_of_patches(
    images: residua.ActivationCache, recwarn: pytest.WarningsRecorder
) -> None:
    """Fits with and without pairs of patches, one after the other, are those of fresh sums."""
    inside = residua.RidgeProbe(alpha=1.0).fit(images)
    across = residua.RidgeProbe(offsets=1, alpha=1.0, across_documents=True).fit(images)
    rows = images.positions_of(images.sequences("train"))
    x = images.residual_array(1)[rows].reshape(-1, TOKENS, images.d_model)
    y = images.residual_array(3)[rows].reshape(-1, TOKENS, images.d_model)
    for probe, offset in ((inside, 0), (across, 1)):
        source = x[:, : TOKENS - offset].reshape(-1, images.d_model).astype(np.float64)
        target = y[:, offset:].reshape(-1, images.d_model).astype(np.float64)
        centred = source - source.mean(0)
        gram = centred.T @ centred + np.eye(images.d_model)
        weight = np.linalg.solve(gram, centred.T @ (target - target.mean(0)))
        found = probe.residual_map(1, offset)
        assert found is not None
        np.testing.assert_allclose(found.weight, weight, atol=1e-6 * np.abs(weight).max())


def test_names_are_those_of_classes_and_positions_have_numbers(
    images: residua.ActivationCache, tmp_path: Path
) -> None:
    from residua.analysis.token_texts.token_names import TokenNames

    names = TokenNames(images)
    assert [names(token) for token in range(3)] == ["cat", "dog", "bird"]
    assert names(-1) == "no token"
    assert names.label_read_token(1) == "#1"
    assert names.passage([0, 1]) == "#0 #1"
