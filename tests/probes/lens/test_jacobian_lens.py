"""A Jacobian lens is exact where the Jacobian is known, and its files are read as tensors only."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.errors import (
    CorruptError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.jacobian_lens import JacobianLens, mean_states
from residua.probes.lens.jacobian_lens_files import read_jacobian_lens, write_jacobian_lens

from ...support.synthetic import make_cache, random_head

WIDTH, LAYERS = 6, 4


def affine_blocks(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Matrix A and vector b of blocks h -> A h + b."""
    rng = np.random.default_rng(seed)
    return [
        (np.eye(WIDTH) + 0.4 * rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=WIDTH))
        for _ in range(LAYERS - 1)
    ]


def exact_jacobians(blocks: list[tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
    """Layer -> d h_L / d h_l, the product of the matrices above the layer."""
    jacobians = {}
    for layer in range(len(blocks)):
        matrix = np.eye(WIDTH)
        for block, _ in blocks[layer:]:
            matrix = block @ matrix
        jacobians[layer] = matrix
    return jacobians


@pytest.fixture(scope="module")
def affine_cache(tmp_path_factory: pytest.TempPathFactory) -> residua.ActivationCache:
    """A cache of a model whose blocks are affine maps of each position."""
    hidden = [np.random.default_rng(1).normal(1.0, 1.0, (400, WIDTH))]
    for matrix, bias in affine_blocks():
        hidden.append(hidden[-1] @ matrix.T + bias)
    layers = [states.astype(np.float32) for states in hidden]
    return make_cache(tmp_path_factory.mktemp("affine"), layers, [20] * 20, random_head(WIDTH, 16))


def exact_lens(**options: Any) -> JacobianLens:
    return JacobianLens.of(exact_jacobians(affine_blocks()), depth=LAYERS - 1, **options)


def lens_logits(lens: JacobianLens, cache: residua.ActivationCache, layer: int) -> np.ndarray:
    hidden = torch.from_numpy(cache.residual_array(layer)[:])
    batch = ReadoutBatch(hidden, torch.zeros(len(hidden), dtype=torch.int64), cache.head.torch())
    return lens.logits(batch, layer, as_offset(lens)).numpy()


def as_offset(lens: JacobianLens) -> int:
    return lens.offsets if isinstance(lens.offsets, int) else lens.offsets[-1]


def test_the_jacobian_of_affine_blocks_gives_the_model_once_the_mean_is_corrected(
    affine_cache: residua.ActivationCache,
) -> None:
    model = affine_cache.logits().compute()
    plain, centered = exact_lens(), exact_lens().with_means(affine_cache, "all")
    assert centered.centered
    for layer in range(LAYERS - 1):
        np.testing.assert_allclose(lens_logits(centered, affine_cache, layer), model, atol=2e-4)
        # Without the correction the biases of the blocks are missing.
        hidden = affine_cache.residual_array(layer)[:] @ exact_jacobians(affine_blocks())[layer].T
        read = affine_cache.head.logits(hidden.astype(np.float32))
        np.testing.assert_allclose(lens_logits(plain, affine_cache, layer), read, atol=2e-4)
        assert np.abs(read - model).max() > 0.1
    evaluation = residua.evaluate(affine_cache, {"c": centered, "p": plain}, split="all")
    for layer in range(LAYERS - 1):
        kl = {row.probe: row.kl for row in evaluation.rows if row.layer == layer}
        assert kl["c"] == pytest.approx(0, abs=1e-6)
        assert (kl["p"] or 0) > 0.01


def test_means_are_those_of_numpy(affine_cache: residua.ActivationCache) -> None:
    sequences = affine_cache.sequences("train")
    rows = affine_cache.positions_of(sequences)
    means = mean_states(affine_cache, (0, 2), "train")
    for layer, mean in means.items():
        expected = affine_cache.residual_array(layer)[:].astype(np.float64)[rows].mean(0)
        np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_a_lens_reads_the_same_at_every_offset(affine_cache: residua.ActivationCache) -> None:
    lens = exact_lens(offsets=(0, 3))
    assert lens.pairs() == [(layer, n) for layer in range(3) for n in (0, 3)]
    at_three = lens_logits(lens, affine_cache, 1)
    np.testing.assert_array_equal(at_three, lens_logits(exact_lens(), affine_cache, 1))
    with pytest.raises(NotFoundError, match="no Jacobian for layer 1, offset 2"):
        lens.residual_map(1, 2)


def test_a_saved_lens_is_the_same_lens(
    affine_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    lens = exact_lens(offsets=(0, 1), n_prompts=7, n_positions=70).with_means(affine_cache)
    loaded = residua.load_probe(lens.save(tmp_path / "lens"))
    assert isinstance(loaded, JacobianLens)
    assert (loaded.n_prompts_, loaded.n_positions_, loaded.depth_) == (7, 70, LAYERS - 1)
    assert loaded.cache_id_ == affine_cache.id
    assert loaded.pairs() == lens.pairs()
    for layer in range(LAYERS - 1):
        np.testing.assert_array_equal(
            lens_logits(loaded, affine_cache, layer), lens_logits(lens, affine_cache, layer)
        )


def test_the_file_with_means_is_exact_and_the_published_one_is_of_half_precision(
    affine_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    lens = exact_lens(n_prompts=3, n_positions=9).with_means(affine_cache)
    exact = read_jacobian_lens(
        write_jacobian_lens(lens, tmp_path / "a.safetensors"), affine_cache, offsets=(0, 2)
    )
    assert exact.centered
    assert exact.layers == (0, 1, 2)
    assert (exact.n_prompts_, exact.n_positions_) == (3, 9)
    assert exact.geometry_ == affine_cache.head.digest
    for layer in exact.layers:
        np.testing.assert_array_equal(exact.jacobians_[layer], lens.jacobians_[layer])
        np.testing.assert_array_equal(exact.means_[layer], lens.means_[layer])

    published = read_jacobian_lens(write_jacobian_lens(lens, tmp_path / "a.pt"), affine_cache)
    assert published.layers == (1, 2)  # the embeddings have no place
    assert not published.centered
    assert published.n_prompts_ == 3
    np.testing.assert_allclose(published.jacobians_[2], lens.jacobians_[2], rtol=1e-3, atol=1e-3)
    centered = read_jacobian_lens(tmp_path / "a.pt", affine_cache, centered=True)
    model = affine_cache.logits().compute()
    np.testing.assert_allclose(lens_logits(centered, affine_cache, 2), model, atol=0.02)


def test_a_file_of_the_published_package_is_read_with_its_convention(
    affine_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    """`save` of the package: J by block, applied as residual @ J.T to the block's output."""
    jacobians = exact_jacobians(affine_blocks())
    matrices = {block: torch.from_numpy(jacobians[block + 1]).half() for block in (0, 1)}
    content = {"J": matrices, "n_prompts": 100, "source_layers": [0, 1], "d_model": WIDTH}
    torch.save(content, tmp_path / "lens.pt")
    lens = read_jacobian_lens(tmp_path / "lens.pt", affine_cache)
    assert lens.layers == (1, 2)
    assert lens.n_prompts_ == 100
    for block in (0, 1):
        output = torch.from_numpy(affine_cache.residual_array(block + 1)[:])
        transported = output @ matrices[block].float().T
        np.testing.assert_allclose(
            lens_logits(lens, affine_cache, block + 1),
            affine_cache.head.logits(transported.numpy()),
            atol=1e-4,
        )
    # What is written has the keys of the package.
    write_jacobian_lens(lens, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert {k: v for k, v in again.items() if k != "J"} == {
        k: v for k, v in content.items() if k != "J"
    }
    for block in (0, 1):
        torch.testing.assert_close(again["J"][block], matrices[block], rtol=0, atol=0)


class Planted:
    """An object whose unpickling would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("planted"),)


def test_pickled_objects_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"J": {0: torch.eye(WIDTH)}, "fit": Planted()}, "evil.pt")
    Path("old.pt").write_bytes(pickle.dumps({"J": Planted()}))
    for name, reason in (("evil.pt", "pickled objects"), ("old.pt", "other pickles are refused")):
        with pytest.raises(CorruptError, match=reason):
            read_jacobian_lens(name)
    assert not Path("planted").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"J": {}}, "expected a dict with 'J'"),
        ([torch.eye(2)], "expected a dict with 'J'"),
        ({"J": {"0": torch.eye(2)}}, "not a number"),
        ({"J": {-1: torch.eye(2)}}, "not a number"),
        ({"jacobian_sum": {0: torch.eye(2)}, "n_done": 3}, "not a number"),
        ({"J": {0: torch.ones(2, 3)}}, "expected .d, d. of floats"),
        ({"J": {0: torch.ones(2)}}, "expected .d, d. of floats"),
        ({"J": {0: torch.ones(2, 2, dtype=torch.int64)}}, "expected .d, d. of floats"),
        ({"J": {0: [1.0]}}, "no tensor"),
        ({"J": {0: torch.eye(2).to_sparse()}}, "no tensor"),
        ({"J": {0: torch.zeros(1, 1).expand(60_000, 60_000)}}, "more than the file holds"),
    ],
)
def test_other_torch_files_are_refused_before_memory_is_taken(
    content: Any, reason: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(CorruptError, match=reason):
        read_jacobian_lens(tmp_path / "lens.pt")


def test_damaged_files_and_wrong_lenses_are_refused(
    affine_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    lens = exact_lens()
    for name in ("lens.pt", "lens.safetensors"):
        data = write_jacobian_lens(lens, tmp_path / name).read_bytes()
        for part in (b"", data[:3], data[: len(data) // 2], data[:-1]):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(CorruptError):
                read_jacobian_lens(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(CorruptError, match="compressed"):
        read_jacobian_lens(tmp_path / "bomb.pt")
    with pytest.raises(NotFoundError, match="no file"):
        read_jacobian_lens(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="as .pt or .safetensors"):
        write_jacobian_lens(lens, tmp_path / "lens.npz")

    # Of another shape than the model of the cache.
    for jacobians in ({1: np.eye(WIDTH + 1)}, {LAYERS - 1: np.eye(WIDTH)}):
        path = write_jacobian_lens(JacobianLens.of(jacobians), tmp_path / "other.safetensors")
        with pytest.raises(MismatchError, match="take a cache of the lens's model"):
            read_jacobian_lens(path, affine_cache)


def test_values_that_are_no_lens_are_refused(tmp_path: Path) -> None:
    eye = np.eye(2)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ({}, {}, {}, "one layer at least"),
        ({0: np.ones((2, 3))}, {}, {}, "square"),
        ({0: eye, 1: np.eye(3)}, {}, {}, "square"),
        ({0: eye * np.nan}, {}, {}, "not finite"),
        ({3: eye}, {}, {"depth": 3}, "not above it"),
        ({0: eye}, {0: np.ones(2)}, {"depth": 3}, "means are needed"),
        ({0: eye}, {0: np.ones(2), 3: np.ones(3)}, {"depth": 3}, "width 2"),
        ({0: eye}, {}, {"centered": True}, "needs the means"),
    ]
    for jacobians, means, options, reason in cases:
        with pytest.raises(UsageError, match=reason):
            JacobianLens.of(jacobians, means, **options)
    with pytest.raises(UsageError, match="beyond float16"):
        write_jacobian_lens(JacobianLens.of({1: 1e6 * eye}), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="no place for layer 0"):
        write_jacobian_lens(JacobianLens.of({0: eye}), tmp_path / "a.pt")
