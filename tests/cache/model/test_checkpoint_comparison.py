"""A model that its checkpoint does not fill, or fills in part, is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import residua
from residua.cache.errors import ModelError
from residua.cache.files.json_files import read_json
from residua.cache.model.model_loading import load_model
from residua.cache.model.source import ModelSource
from residua.cache.model.transformers_guard import guard_transformers

from ...support.architectures import KINDS, build_architecture
from ...support.models import build_model, save_model

Tensors = dict[str, torch.Tensor]


def save_checkpoint(folder: Path, model: Any) -> Path:
    """Save `model` in `folder`, its weights in a single file; return `folder`."""
    with guard_transformers():
        model.save_pretrained(folder)
    return folder


def edit_checkpoint(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors in `folder` by `edit(tensors)`."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load_checkpoint(folder: Path) -> Any:
    return load_model(ModelSource.locate(str(folder)))


def load_or_reason(folder: Path) -> Any:
    """The model, or the message of the error that refuses it."""
    try:
        return load_checkpoint(folder)
    except ModelError as error:
        return str(error)


def remove_tensors(*patterns: str) -> Callable[[Tensors], Tensors]:
    """An edit that removes the tensors whose names match one of `patterns`."""
    return lambda tensors: {
        name: tensor
        for name, tensor in tensors.items()
        if not any(re.search(pattern, name) for pattern in patterns)
    }


def add_tensors(**tensors: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """An edit that adds tensors of ones: name, with `__` for a dot, -> shape."""
    added = {name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()}
    return lambda tensors: tensors | added


def copy_with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    """An edit that adds a copy of every tensor under `prefix`."""
    return lambda tensors: (
        tensors | {f"{prefix}.{name}": tensor.clone() for name, tensor in tensors.items()}
    )


def rename_with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    """An edit that puts `prefix` before every name."""
    return lambda tensors: {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


MLP = "model.layers.1.mlp.down_proj.weight"
WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors], dict, str]] = {
    "of DistributedDataParallel": (
        "llama",
        rename_with_prefix("module"),
        {},
        "begin with 'module.'.*prefix",
    ),
    "compiled": ("llama", rename_with_prefix("_orig_mod"), {}, "begin with '_orig_mod.'"),
    "two prefixes": (
        "llama",
        rename_with_prefix("module._orig_mod"),
        {},
        "begin with 'module._orig_mod.'",
    ),
    "of lightning": ("gpt2", rename_with_prefix("model"), {}, "begin with 'model.'"),
    "without its head": (
        "llama",
        remove_tensors("lm_head"),
        {},
        "lacks 1 .*lm_head.weight.*without its",
    ),
    "one tensor lost": ("llama", remove_tensors(MLP), {}, f"lacks 1 .*: {MLP};"),
    "one norm lost": (
        "llama",
        remove_tensors(r"1\.input_layernorm"),
        {},
        "layers.1.input_layernorm.w",
    ),
    "one bias lost": (
        "gpt2",
        remove_tensors(r"h\.2\.attn\.c_proj\.bias"),
        {},
        "h.2.attn.c_proj.bias",
    ),
    "no embedding, tied": ("gpt2", remove_tensors("wte"), {}, "wte.weight"),
    "more layers than weights": ("llama", dict, {"num_hidden_layers": 5}, "lacks 18 .*layers.3"),
    "fewer layers than weights": (
        "llama",
        dict,
        {"num_hidden_layers": 2},
        r"blocks.* that the model does not have: model\.layers\.2\..*fewer layers",
    ),
    "fewer layers of gpt2": ("gpt2", dict, {"n_layer": 1}, r"blocks.*h\.1\."),
    "another width": ("llama", dict, {"intermediate_size": 64}, r"\(32, 48\), .*\(32, 64\)"),
    "another vocabulary": ("llama", dict, {"vocab_size": 310}, r"\(300, 32\), .*\(310, 32\)"),
    "biases in the blocks": (
        "llama",
        add_tensors(model__layers__0__self_attn__q_proj__bias=(32,)),
        {},
        "blocks.*q_proj.bias",
    ),
    "an adapter": (
        "llama",
        add_tensors(model__layers__0__self_attn__q_proj__lora_A__weight=(2, 32)),
        {},
        "blocks.*lora_A.*adapter",
    ),
    "a bias of the head": (
        "llama",
        add_tensors(lm_head__bias=(300,)),
        {},
        "do not read.*lm_head.bias",
    ),
    "positions": (
        "llama",
        add_tensors(model__embed_positions__weight=(9, 32)),
        {},
        "embed_positions",
    ),
    "a second copy": ("llama", copy_with_prefix("ema"), {}, "second copy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_is_not_the_models_is_refused(name: str, tmp_path: Path) -> None:
    kind, edit, config, reason = WRONG[name]
    folder = save_checkpoint(tmp_path / "model", build_model(kind))
    edit_checkpoint(folder, edit)
    edit_config(folder, **config)
    with pytest.raises(ModelError, match=reason):
        load_checkpoint(folder)


def test_an_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", build_architecture("bert"))
    with guard_transformers():
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    save_checkpoint(folder, encoder)
    with pytest.raises(ModelError, match=r"lacks \d+ .*: cls\.predictions.*without its"):
        load_checkpoint(folder)


def test_a_base_model_whose_head_is_its_embedding_is_whole(tmp_path: Path) -> None:
    model: Any = build_model("gpt2")
    folder = save_checkpoint(tmp_path / "model", model.transformer)
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.lm_head.weight, model.transformer.wte.weight)


def test_models_loaded_in_many_threads_leave_the_next_one_tied(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(load_checkpoint, [folder] * 64))
    for loaded in [*models, load_checkpoint(folder)]:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


HARMLESS: dict[str, tuple[str, Callable[[Tensors], Tensors], dict]] = {
    "rotary frequencies": (
        "llama",
        add_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=(4,)),
        {},
    ),
    "causal masks": ("gpt2", add_tensors(transformer__h__0__attn__masked_bias=(1,)), {}),
    "scales of a quantized cache": (
        "llama",
        add_tensors(model__layers__0__self_attn__k_scale=(1,)),
        {},
    ),
    "an image tower": (
        "llama",
        add_tensors(
            vision_tower__encoder__layers__0__self_attn__q_proj__weight=(8, 8),
            model__visual__blocks__0__norm__weight=(8,),
        ),
        {},
    ),
    "a task's head": (
        "llama",
        add_tensors(score__weight=(2, 32), v_head__summary__weight=(1, 32)),
        {},
    ),
    "further predictions": ("llama", add_tensors(mtp__layers__0__eh_proj__weight=(8, 8)), {}),
    "numbered predictions": (
        "llama",
        add_tensors(model__layers__3__eh_proj__weight=(8, 8)),
        {"num_nextn_predict_layers": 1},
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_model_does_not_read_is_noted_and_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    kind, edit, config = HARMLESS[name]
    folder = save_checkpoint(tmp_path / "model", model := build_model(kind))
    edit_checkpoint(folder, edit)
    edit_config(folder, **config)
    loaded = load_checkpoint(folder)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_unused_tensors_are_in_the_provenance(texts_file: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    edit_checkpoint(folder, add_tensors(score__weight=(2, 32)))
    cache = residua.extract(folder, texts_file, root=tmp_path / "root", max_tokens=300)
    notes = read_json(cache.path / "provenance.json")["checkpoint"]
    assert notes == {"computed": [], "unused": ["score.weight"]}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_class_loads_what_it_saved_and_misses_what_is_taken_out(
    kind: str, tmp_path: Path
) -> None:
    try:
        model = build_architecture(kind)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    folder = save_checkpoint(tmp_path / "model", model)
    first = load_or_reason(folder)
    if isinstance(first, str):  # the class reads the configuration of a part, which has no folder
        assert "transformers has none for" in first or "reads images among" in first
        return
    whole = {name: tensor.clone() for name, tensor in first.named_parameters()}
    for name, tensor in model.named_parameters():
        assert torch.equal(whole[name], tensor), name
    saved = load_file(folder / "model.safetensors")
    for lost in sorted(saved)[:: max(1, len(saved) // 3)]:
        edit_checkpoint(folder, lambda t, lost=lost: {k: v for k, v in saved.items() if k != lost})
        again = load_or_reason(folder)
        if isinstance(again, str):
            # Tensors of single experts are packed into one, which is shorter without one of them.
            assert (
                "checkpoint lacks" in again or "packed into them (of one expert) is lost" in again
            )
            continue
        # Computed, or tied to another tensor of the checkpoint: the numbers are the same.
        for name, tensor in again.named_parameters():
            assert torch.equal(whole[name], tensor), (lost, name)
    shutil.rmtree(folder)
