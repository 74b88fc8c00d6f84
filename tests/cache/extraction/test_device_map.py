"""Models spread over devices: residual streams, head and identity are those of one device."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.checks.model_checks import check_model
from residua.cache.errors import UsageError
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.forward.device_copies import HostCopies
from residua.cache.forward.kept_logits import KeptLogits
from residua.cache.forward.stage_times import StageTimes
from residua.cache.model import model_loading
from residua.cache.model.checkpoint_comparison import _check_filled
from residua.cache.model.model_devices import (
    device_names,
    input_device,
    loaded_parameters,
    loaded_tensor,
)
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from ...support.models import VOCAB, build_model
from ...support.pretended_device import DEVICE, pretended_device
from ...support.toys import Block, Toy


class SpreadBlock(Block):
    """A block that is computed where its weights are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = input.to(self.weight.device)
        steps = torch.arange(1, input.shape[1] + 1, device=input.device)[:, None]
        mean = input.cumsum(1) / steps
        return input + torch.nn.functional.linear(mean, self.weight, self.bias).tanh()


class SpreadToy(Toy):
    """The embedding and the first block are on the CPU, everything behind on another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        blocks = [SpreadBlock(16, 16) for _ in self.blocks]
        for mine, block in zip(blocks, self.blocks, strict=True):
            mine.load_state_dict(block.state_dict())
        self.blocks = torch.nn.ModuleList(blocks)
        for module in (self.blocks[1], self.norm, self.unembed):
            for name, parameter in list(module._parameters.items()):
                assert parameter is not None
                moved = torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)
                module._parameters[name] = moved
        self.requires_grad_(False)


def stream() -> TokenStream:
    rng = np.random.default_rng(3)
    return from_sequences([rng.integers(0, VOCAB, 50) for _ in range(6)])


def test_blocks_on_two_devices_are_read_and_checked_as_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The pretended device knows no inference mode, whose operations come whole.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    expected = check_model(Toy().eval(), stream(), "float32", "auto", "topk:5")
    ids = torch.from_numpy(stream().ids[:40].astype(np.int64)).reshape(2, 20)
    with torch.inference_mode():
        plain = expected.stack.residuals(ids)
    with pretended_device():
        model = SpreadToy(DEVICE).eval()
        assert input_device(model) == torch.device("cpu")
        report = check_model(model, stream(), "float32", "auto", "topk:5")
        with torch.inference_mode():
            layers = report.stack.residuals(ids)
            assert [layer.device.type for layer in layers] == ["cpu", "cpu", "meta"]
            # The copies of an extraction, with kept logits beside layer L.
            kept = KeptLogits(report.head, "topk:5", "float32", layers[-1].device)
            copies = HostCopies(StageTimes())
            rows = copies.run(
                lambda: {**dict(enumerate(layers)), **kept(layers[-1].flatten(0, 1))},
                {0: "float32", 2: "float16", "logits/values": "float32"},
                40,
            )
    assert report.head.digest == expected.head.digest
    assert report.dtypes == expected.dtypes
    for layer, other in zip(layers, plain, strict=True):
        torch.testing.assert_close(layer.cpu(), other, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(rows[2].stored, plain[2].half().numpy())
    logits = expected.head.logits(plain[2].numpy()).reshape(40, -1)
    largest = np.sort(logits, -1)[:, ::-1][:, :5]
    np.testing.assert_allclose(rows["logits/values"].stored, largest, rtol=1e-5, atol=1e-5)


def test_weights_that_are_elsewhere_are_read_through_their_hooks() -> None:
    model = Toy()
    weight = model.unembed.weight.detach().clone()
    offloaded = SimpleNamespace(weights_map={"weight": weight, "bias": weight[:, 0]})
    hook = SimpleNamespace(hooks=[offloaded, SimpleNamespace(execution_device="cpu")])
    model.unembed._hf_hook = hook  # pyright: ignore[reportArgumentType]
    model.embed._hf_hook = SimpleNamespace(execution_device="cpu")  # pyright: ignore[reportArgumentType]
    model.unembed.to("meta")
    _check_filled(model)
    assert torch.equal(loaded_tensor(model.unembed, "weight"), weight)
    assert not any(parameter.is_meta for parameter in loaded_parameters(model))
    assert input_device(model) == torch.device("cpu")
    model.hf_device_map = {"embed": "cpu", "blocks.0": 0, "blocks.1": "disk", "norm": 0}  # pyright: ignore[reportArgumentType]
    assert device_names(model) == "cpu, cuda:0, disk"


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_a_model_partly_on_the_disk_gives_the_same_cache(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"context": 32, "max_tokens": 600}
    plain = residua.extract(model_folder, texts_file, root=tmp_path / "plain", **options)
    model: Any = build_model("gpt_neox")
    outer = [name for name, _ in model.named_children() if name != "gpt_neox"]
    inner = [name for name, _ in model.gpt_neox.named_children() if name != "layers"]
    devices = dict.fromkeys([*outer, *(f"gpt_neox.{name}" for name in inner)], "cpu")
    devices |= {f"gpt_neox.layers.{n}": "disk" if n % 2 else "cpu" for n in range(plain.n_blocks)}
    spread = residua.extract(
        model_folder, texts_file, root=tmp_path / "spread", device_map=devices, **options
    )
    assert spread.id == plain.id
    assert spread.head.digest == plain.head.digest
    for layer in plain.layers:
        difference = np.abs(spread.residual_array(layer)[:] - plain.residual_array(layer)[:])
        assert float(difference.max()) <= 1e-5


def test_a_map_without_accelerate_says_what_to_install(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loading, "is_installed", lambda library: False)
    with pytest.raises(UsageError, match=r"pip install 'residua\[accelerate\]'"):
        residua.extract(model_folder, texts_file, root=tmp_path, device_map="auto")
    assert not list(tmp_path.rglob("manifest.json"))


def test_wrong_maps_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="device_map 'all' is unknown; choose one of auto"):
        ExtractionRequest("model", "data", device_map="all")
    with pytest.raises(UsageError, match="both say where the model goes"):
        ExtractionRequest("model", "data", device_map="auto", device="cuda")
