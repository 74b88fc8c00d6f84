"""Lens files of the tuned-lens package: a lens saved by one gives the same logits in the other."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.errors import CorruptError, MismatchError, NotFoundError, UsageError
from residua.probes.base.readout import ReadoutBatch
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.lens.tuned_lens_files import read_tuned_lens, unembed_hash, write_tuned_lens
from residua.probes.ridge.solver import AffineMap


class PackageLens(torch.nn.Module):
    """`TunedLens` of tuned-lens 0.2.0, by its source: parameters, `save`, loading, `forward`."""

    def __init__(self, norm: torch.nn.Module, unembedding: torch.nn.Linear, config: dict) -> None:
        super().__init__()
        self.norm, self.unembedding, self.config = norm, unembedding, config
        width, layers = config["d_model"], config["num_hidden_layers"]
        self.layer_translators = torch.nn.ModuleList(
            torch.nn.Linear(width, width, bias=config["bias"]) for _ in range(layers)
        )

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True, parents=True)
        torch.save(self.layer_translators.state_dict(), path / "params.pt")
        (path / "config.json").write_text(json.dumps(self.config))

    def load(self, path: Path) -> dict:
        config = json.loads((path / "config.json").read_text())
        state = torch.load(path / "params.pt", weights_only=True)
        self.layer_translators.load_state_dict(state)
        return config

    def transform_hidden(self, h: torch.Tensor, idx: int) -> torch.Tensor:
        return h + self.layer_translators[idx](h)

    def forward(self, h: torch.Tensor, idx: int) -> torch.Tensor:
        return self.unembedding(self.norm(self.transform_hidden(h, idx)))

    def unembed_hash(self) -> str:
        weight = self.unembedding.weight.data.detach().cpu().float().numpy()
        return hashlib.sha256(str.encode(np.array_str(weight, precision=1))).hexdigest()


@pytest.fixture
def package_lens(model_folder: Path, tiny_cache: residua.ActivationCache) -> PackageLens:
    """A random lens of the package for the model of `tiny_cache`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    config = {
        "base_model_name_or_path": str(model_folder),
        "d_model": tiny_cache.d_model,
        "num_hidden_layers": tiny_cache.n_blocks,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }
    torch.manual_seed(0)
    lens = PackageLens(model.gpt_neox.final_layer_norm, model.get_output_embeddings(), config)
    lens.config["unembed_hash"] = lens.unembed_hash()
    return lens.requires_grad_(False)


def readout_batch(cache: residua.ActivationCache, layer: int) -> ReadoutBatch:
    hidden = torch.from_numpy(cache.residual_array(layer)[:50])
    return ReadoutBatch(hidden, torch.zeros(50, dtype=torch.int64), cache.head.torch())


def random_lens(cache: residua.ActivationCache) -> TunedLens:
    rng = np.random.default_rng(0)
    shape = cache.d_model, cache.d_model
    maps = {
        (layer, 0): AffineMap(
            (np.eye(shape[0]) + 0.1 * rng.normal(size=shape)).astype(np.float32),
            rng.normal(size=shape[0]).astype(np.float32),
        )
        for layer in range(cache.n_blocks)
    }
    return TunedLens.of(maps, cache.head.digest)


def test_a_lens_of_the_package_gives_its_logits_here(
    package_lens: PackageLens, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    package_lens.save(tmp_path)
    lens = read_tuned_lens(tmp_path, tiny_cache)
    assert lens.pairs() == [(layer, 0) for layer in range(tiny_cache.n_blocks)]
    for layer in range(tiny_cache.n_blocks):
        batch = readout_batch(tiny_cache, layer)
        assert batch.hidden is not None
        torch.testing.assert_close(
            lens.logits(batch, layer, 0), package_lens(batch.hidden, layer), rtol=1e-4, atol=1e-4
        )


def test_a_lens_from_here_gives_its_logits_in_the_package(
    package_lens: PackageLens, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    lens = random_lens(tiny_cache)
    write_tuned_lens(lens, tmp_path, tiny_cache)
    config = package_lens.load(tmp_path)
    assert config == package_lens.config | {
        "base_model_name_or_path": tiny_cache.manifest.model_name
    }
    for layer in range(tiny_cache.n_blocks):
        batch = readout_batch(tiny_cache, layer)
        assert batch.hidden is not None
        torch.testing.assert_close(
            package_lens(batch.hidden, layer), lens.logits(batch, layer, 0), rtol=1e-4, atol=1e-4
        )


def test_the_hash_does_not_depend_on_how_numpy_prints() -> None:
    matrix = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)
    expected = hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()
    with np.printoptions(precision=8, threshold=10**9, linewidth=40, suppress=True):
        assert unembed_hash(matrix) == expected


def test_a_lens_of_another_model_is_refused(
    package_lens: PackageLens, tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    package_lens.config["unembed_hash"] = "0" * 64
    package_lens.save(tmp_path)
    with pytest.raises(MismatchError, match="another unembedding"):
        read_tuned_lens(tmp_path, tiny_cache)
    assert read_tuned_lens(tmp_path, tiny_cache, force=True).geometry_ == tiny_cache.head.digest
    package_lens.config["num_hidden_layers"] = 2
    package_lens.save(tmp_path)
    with pytest.raises(MismatchError, match="2 layers"):
        read_tuned_lens(tmp_path, tiny_cache, force=True)


class Harmful:
    def __reduce__(self):
        return (print, ("loaded",))


def test_objects_in_params_are_refused_unread(
    package_lens: PackageLens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package_lens.save(tmp_path)
    torch.save({"0.weight": Harmful()}, tmp_path / "params.pt")
    with pytest.raises(CorruptError, match="not a state dict"):
        read_tuned_lens(tmp_path)
    (tmp_path / "params.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(CorruptError, match="not a state dict"):
        read_tuned_lens(tmp_path)
    assert capsys.readouterr().out == ""


def test_other_files_are_refused_by_name(package_lens: PackageLens, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="config.json is missing"):
        read_tuned_lens(tmp_path)
    package_lens.save(tmp_path)
    (tmp_path / "params.pt").unlink()
    with pytest.raises(NotFoundError, match="params.pt is missing"):
        read_tuned_lens(tmp_path)
    package_lens.layer_translators = package_lens.layer_translators[:2]
    package_lens.save(tmp_path)
    with pytest.raises(CorruptError, match="no translator of width 32 for layer 2"):
        read_tuned_lens(tmp_path)
    package_lens.config["lens_type"] = "mlp"
    package_lens.save(tmp_path)
    with pytest.raises(UsageError, match="of type 'mlp'"):
        read_tuned_lens(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptError, match="is not JSON"):
        read_tuned_lens(tmp_path)


def test_a_lens_without_bias_is_read(package_lens: PackageLens, tmp_path: Path) -> None:
    package_lens.config["bias"] = False
    lens = PackageLens(package_lens.norm, package_lens.unembedding, package_lens.config)
    lens.save(tmp_path)
    assert not read_tuned_lens(tmp_path).map(1).bias.any()


def test_a_lens_that_lacks_layers_is_not_written(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    lens = random_lens(tiny_cache)
    del lens.maps_[1, 0]
    with pytest.raises(UsageError, match=r"lacks \[1\]"):
        write_tuned_lens(lens, tmp_path, tiny_cache)
