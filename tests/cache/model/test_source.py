"""The identity of a model covers the bytes of whatever is loaded, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import residua
from residua.cache.errors import ModelError
from residua.cache.extraction.answer import answer_request, find_match
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.model import tokenizer as tokenizers_of
from residua.cache.model.source import ModelSource

from ...support.models import VOCAB, save_model, texts


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def identity(folder: Path, **options: Any) -> Any:
    return ModelSource.locate(str(folder), **options).identity


def change_json(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}))


def test_how_tensors_are_spread_over_files_does_not_matter(model: Path, tmp_path: Path) -> None:
    whole = identity(model)
    spread = tmp_path / "spread"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(spread, max_shard_size="20KB")
    shutil.copy(model / "config.json", spread)
    assert len(list(spread.glob("*.safetensors"))) > 2
    assert identity(spread) == whole
    tensors = load_file(model / "model.safetensors")
    save_file(dict(reversed(tensors.items())), model / "model.safetensors", {"format": "pt"})
    assert identity(model) == whole
    (model / "consolidated.safetensors").write_bytes(b"read by nobody")
    assert identity(model) == whole


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_any_tensor_that_changes_is_another_model(model: Path, change: str) -> None:
    before = identity(model)
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[3]
    if change == "value":
        tensors[name].view(-1)[0] += 1
    elif change == "name":
        tensors[f"{name}.other"] = tensors.pop(name)
    elif change == "dtype":
        tensors[name] = tensors[name].view(torch.int32)
    else:
        tensors[name] = tensors[name].reshape(1, *tensors[name].shape)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert identity(model).weights != before.weights


def write_index(folder: Path, files: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.gguf"])
def test_an_index_that_names_other_files_than_safetensors_is_refused(
    model: Path, name: str, texts_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "beside.safetensors")
    torch.save(tensors, model / name)
    write_index(model, dict.fromkeys(tensors, name))
    with pytest.raises(ModelError, match=rf"{name} is not read; .*save_pretrained"):
        residua.extract(model, texts_file, root=tmp_path / "root")
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


def test_weights_outside_the_folder_are_refused(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    for name in ("../outside.safetensors", str(outside)):
        write_index(model, {"x": name})
        with pytest.raises(ModelError, match="lies outside"):
            identity(model)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"])
def test_an_index_that_cannot_be_read_is_refused(model: Path, raw: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"index\.json"):
        identity(model)


def test_one_tensor_in_two_files_is_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    save_file({name: t * 2 for name, t in tensors.items()}, model / "b.safetensors")
    write_index(model, {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(tensors)})
    with pytest.raises(ModelError, match="which another file holds too"):
        identity(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing; expected the model's"):
        identity(model)
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights are not read"):
        identity(model)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty", "link"])
def test_weights_that_cannot_be_read_are_refused(model: Path, damage: str, version: int) -> None:
    path = model / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    if damage == "link":
        path.symlink_to(model / "nowhere.safetensors")
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        path.write_bytes({"pointer": pointer, "cut": raw[:-100], "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ModelSource.locate(str(model)).identity_for_format(version)


def test_an_adapter_is_refused(model: Path) -> None:
    change_json(model / "adapter_config.json", peft_type="LORA")
    with pytest.raises(ModelError, match="holds an adapter of another model"):
        identity(model)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, out: out * {factor})
"""


def write_code(model: Path, factor: float) -> None:
    (model / "mine.py").write_text(CODE.format(factor=factor))
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    change_json(model / "config.json", auto_map=names, model_type="mine")


def test_code_that_runs_is_part_of_the_identity(texts_file: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama", "llama")
    options: dict[str, Any] = {
        "root": tmp_path / "root", "trust_remote_code": True, "max_tokens": 300, "context": 64,
    }  # fmt: skip
    write_code(model, 1.0)
    one = residua.extract(model, texts_file, **options)
    assert residua.extract(model, texts_file, **options).id == one.id
    write_code(model, 2.0)
    two = residua.extract(model, texts_file, **options)
    assert one.id != two.id
    assert one.manifest.model.weights == two.manifest.model.weights
    assert np.abs(one.residual_array(2)[:] - two.residual_array(2)[:]).max() > 0.1
    # A repair runs that code again, and only if it is allowed to.
    (two.path / "arrays.zarr/residual/2/c/0/0").unlink()
    with pytest.raises(ModelError, match="--trust-remote-code"):
        residua.repair(two.path)
    want = two.residual_array(3)[:]
    assert residua.repair(two.path, trust_remote_code=True).ok
    np.testing.assert_array_equal(residua.ActivationCache(two.path).residual_array(3)[:], want)


def test_code_that_does_not_run_is_not(model: Path) -> None:
    before = identity(model)
    (model / "notes.py").write_text("print('of no concern')")
    assert identity(model) == before
    assert identity(model, trust_remote_code=True).code is None  # config.json names no class of it


def test_code_of_another_repository_is_refused(model: Path) -> None:
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "some/one--mine.Mine"})
    with pytest.raises(ModelError, match="takes code from another repository"):
        identity(model, trust_remote_code=True)


TEXTS = ["the dog ran", " leading", "the cat <marker> sat", "", "two  spaces\nand a line", "tree "]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
    "special": {"additional_special_tokens": ["cat"]},
    "bos": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    "eos": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_models_own_tokenizer(
    model: Path, tmp_path: Path, name: str
) -> None:
    change_json(model / "tokenizer_config.json", **SETTINGS[name])
    own: Any = AutoTokenizer.from_pretrained(model)
    for _ in range(2):  # converted, and as it is remembered
        source = ModelSource.locate(str(model))
        for text in TEXTS:
            assert source.tokenizer.encode(text).ids == own(text)["input_ids"], text
    if max(max(own(text)["input_ids"], default=0) for text in TEXTS) >= VOCAB:
        return
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    cache = residua.extract(model, data, root=tmp_path / "root", pack=False, layers=(0,))
    rows = cache.array("sequences/row_id")[:]
    for row, start, length in zip(rows, cache.sequence_start, cache.sequence_length, strict=True):
        assert cache.tokens[start : start + length].tolist() == own(TEXTS[row])["input_ids"]
    kept = cache.tokenizer()
    assert kept.encode(TEXTS[0]).ids == own(TEXTS[0])["input_ids"]


def test_other_settings_of_the_tokenizer_are_another_cache(
    model: Path, texts_file: Path, tmp_path: Path
) -> None:
    request = ExtractionRequest(
        str(model), str(texts_file), tmp_path, context=64, pack=False, max_tokens=300
    )
    first = answer_request(request).cache
    change_json(model / "tokenizer_config.json", **SETTINGS["prefix"])
    assert find_match(request).answer == "miss"
    assert answer_request(request).cache.id != first.id


def test_a_tokenizer_is_converted_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from residua.cache.model import tokenizer as loading

    change_json(model / "tokenizer_config.json", note="a file that no other test has")
    seen: list[Path] = []
    convert = loading.convert_tokenizer

    def record_and_convert(folder: Path, trust_remote_code: bool = False) -> Any:
        seen.append(folder)
        return convert(folder, trust_remote_code)

    monkeypatch.setattr(loading, "convert_tokenizer", record_and_convert)
    first = tokenizers_of.load_tokenizer(model)
    assert tokenizers_of.load_tokenizer(model).to_str() == first.to_str()
    assert len(seen) == 1
    for memo in (tokenizers_of.memo_path().parent / "tokenizers").glob("*.json"):
        memo.write_bytes(memo.read_bytes()[:-30])
    assert tokenizers_of.load_tokenizer(model).to_str() == first.to_str()
    assert len(seen) == 2
    change_json(model / "special_tokens_map.json", eos_token="<|endoftext|>")
    tokenizers_of.load_tokenizer(model)
    assert len(seen) == 3


def test_code_of_a_tokenizer_never_runs_and_nobody_is_asked(
    model: Path, texts_file: Path, tmp_path: Path
) -> None:
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    names = {"AutoTokenizer": ["mine.Mine", None]}
    change_json(model / "tokenizer_config.json", auto_map=names, tokenizer_class="Mine")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        residua.extract(model, texts_file, root=tmp_path / "root")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("positions", [[[1], [2]], [[1, 2], [0]], [[], [2, 3]]])
def test_other_positions_of_the_same_texts_are_another_cache(
    model_folder: Path, tmp_path: Path, positions: list[list[int]]
) -> None:
    """The sequences are the same, what is kept of them is not."""
    data = tmp_path / "data.jsonl"

    def ask(kept: list[list[int]]) -> ExtractionRequest:
        rows = zip(texts(2), kept, strict=True)
        lines = [json.dumps({"text": text, "positions": p}) + "\n" for text, p in rows]
        data.write_text("".join(lines))
        options: dict[str, Any] = {"context": 64, "pack": False, "positions": "explicit"}
        return ExtractionRequest(str(model_folder), str(data), tmp_path / "root", **options)

    first = answer_request(ask([[2], [2]])).cache
    assert find_match(ask([[2], [2]])).answer == "hit"
    done = answer_request(ask(positions))
    assert (done.status, done.cache.id != first.id) == ("extracted", True)
    want = [index for kept in positions for index in kept]
    assert sorted(done.cache.array("tokens/index")[:].tolist()) == sorted(want)


def test_a_model_saved_by_its_folder_is_extracted(tmp_path: Path, texts_file: Path) -> None:
    """The tokens, the order and the splits are those of the same model anywhere."""
    ids = set()
    for name in ("one", "two"):
        folder = save_model(tmp_path / name)
        ids.add(residua.extract(folder, texts_file, root=tmp_path / f"of-{name}").id)
    assert len(ids) == 1
