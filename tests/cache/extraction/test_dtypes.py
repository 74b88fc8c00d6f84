"""Which dtype a model runs in, which one its layers are kept in, and what does not fit into it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import residua
from residua.cache.checks.model_checks import value_range
from residua.cache.errors import ModelError
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.prepare import with_loaded_dtype
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.format.dtypes import FP16_ROUNDING, choose_dtype
from residua.cache.model.model_loading import load_model
from residua.cache.model.source import ModelSource
from residua.cache.model.transformers_guard import guard_transformers
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import build_model, build_tokenizer, save_model, texts


def save(folder: Path, weights: torch.dtype, **fields: Any) -> Path:
    """A tiny model of `weights` whose config.json has `fields`, and a dtype only from them."""
    model: Any = build_model("gpt_neox", weights)
    with guard_transformers():
        model.save_pretrained(folder, max_shard_size=fields.pop("shard", "1GB"))
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.endswith("dtype")}
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


CHECKPOINTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16, not in the configuration": (torch.bfloat16, {}),
    "float16, not in the configuration": (torch.float16, {}),
    "float32, not in the configuration": (torch.float32, {}),
    "in several files": (torch.bfloat16, {"shard": "40KB"}),
    "null in the configuration": (torch.bfloat16, {"dtype": None}),
    "of the configuration": (torch.float32, {"dtype": "bfloat16"}),
    "by its old name": (torch.float32, {"torch_dtype": "float16"}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_dtype_is_known_without_loading_the_weights(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", CHECKPOINTS[name][0], **CHECKPOINTS[name][1])
    with guard_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert f"torch.{ModelSource.locate(str(folder)).compute_dtype}" == str(loaded.dtype)


def test_the_first_tensor_by_name_decides_as_in_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", torch.float32)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first].bfloat16()}, path, metadata={"format": "pt"})
    source = ModelSource.locate(str(folder))
    assert source.compute_dtype == "bfloat16"
    assert with_loaded_dtype(source, load_model(source)).compute_dtype == "bfloat16"


def test_the_loaded_model_has_the_last_word(tmp_path: Path) -> None:
    source = ModelSource.locate(str(save(tmp_path / "model", torch.float32)))
    model = load_model(source)
    assert with_loaded_dtype(source, model) is source
    assert with_loaded_dtype(source, model.half()).compute_dtype == "float16"


def test_a_bfloat16_model_without_a_dtype_is_kept_in_bfloat16(
    texts_file: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", torch.bfloat16)
    request = ExtractionRequest(
        str(folder), str(texts_file), root=tmp_path / "root", max_tokens=400
    )
    extraction = answer_request(request)
    assert extraction.cache.manifest.capture.compute_dtype == "bfloat16"
    dtypes = {
        extraction.cache.residual_array(n).layout.logical_dtype for n in extraction.cache.layers
    }
    assert dtypes == {"bfloat16"}
    assert answer_request(request).status == "hit"


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, "float16"), (1e-3, "float16"), (1e-6, "float32"), (1e-30, "float32"), (1e5, "bfloat16")],
)
def test_float16_is_taken_where_it_loses_no_more_than_its_rounding(
    scale: float, expected: str
) -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * scale
    measured_range = value_range(rows)
    if scale < 1e4:
        half = rows.numpy().astype(np.float16).astype(np.float64)
        loss = np.abs(half - rows.double().numpy()).max(-1) / rows.abs().amax(-1).numpy()
        assert measured_range.float16_loss == pytest.approx(loss.max(), rel=1e-6)
        assert (measured_range.float16_loss <= FP16_ROUNDING) == (expected == "float16")
    assert measured_range.absmax == float(rows.abs().max())
    assert choose_dtype(measured_range, "float32", "auto") == expected
    assert choose_dtype(measured_range, "bfloat16", "auto") == "bfloat16"
    assert choose_dtype(measured_range, "float32", "float16") == "float16"


def test_layers_of_tiny_values_lose_nothing(texts_file: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "gpt_neox.embed_in.weight"
    tensors[name] = tensors[name] * 1e-5
    save_file(tensors, path, metadata={"format": "pt"})
    cache = residua.extract(folder, texts_file, root=tmp_path / "root", max_tokens=400)
    dtypes = {layer: cache.residual_array(layer).layout.logical_dtype for layer in cache.layers}
    assert dtypes == {0: "float32", 1: "float16", 2: "float16", 3: "float16"}
    expected = tensors[name].numpy()[np.asarray(cache.tokens[:])]
    np.testing.assert_array_equal(cache.residual_array(0)[:], expected)


@pytest.fixture
def late(tmp_path: Path) -> tuple[Path, Path, int]:
    """A model with one token of huge values, texts that hold it late, and the token's number."""
    folder, data = save_model(tmp_path / "model"), tmp_path / "late.jsonl"
    token = build_tokenizer().encode("~", add_special_tokens=False)[-1]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["gpt_neox.embed_in.weight"][token] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    rows = texts(60)
    last = np.random.default_rng(0).permutation(60)[-2:]  # read last, so never calibrated
    rows = [f"{text} ~" if n in last else text for n, text in enumerate(rows)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder, data, token


def sequences_with(cache: ActivationCache, token: int) -> set[int]:
    return set(np.unique(cache.array("tokens/sequence")[:][cache.tokens[:] == token]).tolist())


def test_a_value_too_large_for_its_dtype_costs_its_sequence_alone(
    late: tuple[Path, Path, int], tmp_path: Path
) -> None:
    folder, data, token = late
    request = ExtractionRequest(
        str(folder), str(data), root=tmp_path / "root", pack=False, part_positions=256
    )
    extraction = answer_request(request)
    cache, wrong = extraction.cache, sequences_with(extraction.cache, token)
    assert len(wrong) == 2
    assert set(cache.quarantined) == wrong
    assert extraction.to_dict()["quarantined"] == 2
    reason = cache.quarantined[min(wrong)]
    assert "layer 0 reaches 1e+05, which float16 cannot hold" in reason
    assert "--dtype bfloat16 or float32" in reason
    assert not wrong & set(cache.sequences("all").tolist())
    rows, has_token = cache.residual_array(0)[:], cache.tokens[:] == token
    assert np.isnan(rows[has_token]).all()
    assert np.isfinite(rows[~has_token]).all()
    assert max(r.arrays["residual/0"].absmax for r in cache.committed.values()) == 1e5
    assert residua.verify(cache.path).ok
    whole = residua.extract(folder, data, root=tmp_path / "root", pack=False, dtype="float32")
    assert not whole.quarantined
    assert np.abs(whole.residual_array(0)[:][has_token]).max() == 1e5


def test_what_was_written_before_a_late_overflow_stays(
    late: tuple[Path, Path, int], tmp_path: Path
) -> None:
    folder, data, _ = late
    options: dict[str, Any] = {"root": tmp_path / "root", "pack": False, "part_positions": 256}
    with pytest.raises(ModelError, match=r"document \d+\) cannot be kept: layer 0.*--dtype"):
        residua.extract(folder, data, on_error="raise", **options)
    (path,) = (tmp_path / "root").glob("[0-9a-f]*")
    before = len(ActivationCache(path).committed)
    assert 0 < before < ActivationCache(path).n_parts
    extraction = answer_request(ExtractionRequest(str(folder), str(data), **options))
    assert extraction.status == "resumed"
    assert extraction.written < extraction.cache.positions
    assert len(extraction.cache.quarantined) == 2


def test_a_cache_that_grows_keeps_its_quarantine(
    late: tuple[Path, Path, int], tmp_path: Path
) -> None:
    folder, data, token = late
    options: dict[str, Any] = {"root": tmp_path / "root", "pack": False}
    old = residua.extract(folder, data, **options)
    with data.open("a") as file:
        file.write(json.dumps({"text": "the dog and the cat ran under a big tree"}) + "\n")
    new = residua.extract(folder, data, **options)
    assert new.manifest.extra["extends"] == old.id
    assert set(new.quarantined) == sequences_with(new, token)


def test_logits_too_large_for_their_dtype_are_never_infinite(
    texts_file: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["embed_out.weight"] = tensors["embed_out.weight"] * 1e7
    save_file(tensors, path, metadata={"format": "pt"})
    cache = residua.extract(
        folder, texts_file, root=tmp_path / "root", max_tokens=300, logits="full", dtype="float16"
    )
    stored = cache.array("logits/full")[:]
    assert not np.isinf(stored).any()
    assert np.isnan(stored).any()
    assert all("logits/full reaches" in reason for reason in cache.quarantined.values())
    shutil.rmtree(folder)
