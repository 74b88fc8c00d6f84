"""Loading of a model without its lower blocks: `load_upper_blocks`.

transformers gets a state dict in which tensors of the lower blocks are one row of random numbers
each, repeated without memory; their bytes in the files are not read. With them the whole model
runs, so that blocks and resuming are proved as in a whole model; afterwards they are dropped.
"""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import is_out_of_memory
from ..errors import ModelError
from ..model.checkpoint_comparison import compare_with_checkpoint
from ..model.config_check import check_config_size, describe_error
from ..model.model_loading import LOADING_ERRORS
from ..model.safetensors_header import RUNNING_DTYPES, TensorEntry, read_header
from ..model.source import ModelSource
from ..model.transformers_guard import guard_transformers

if TYPE_CHECKING:
    import torch

SPREAD = 0.05
"""Standard deviation of the numbers that stand for tensors of lower blocks."""


def load_upper_blocks(
    source: ModelSource,
    layer: int,
    device: "str | torch.device" = "cpu",
    attention: str = "default",
) -> "tuple[torch.nn.Module, str] | None":
    """The model of `source` with random numbers in blocks 1..`layer`, and the name of its blocks.

    None where the folder does not allow it: code of its own, packed (quantized) weights, tensors
    whose block cannot be told from their names, blocks that run several times. Raises `ModelError`
    if the checkpoint does not fill the model.
    """
    if source.trust_remote_code or source.config.get("quantization_config"):
        return None
    headers = {path: read_header(path) for path in source.weight_files}
    check_config_size(source.folder, source.config, source.weight_files, False)
    model_class, config, name, count = _model_class(source.folder) or (None, None, "", 0)
    if model_class is None or not 0 < layer < count:
        return None
    block_of = _block_numbers(headers, name, count)
    if block_of is None:
        return None
    dtype = getattr(config, "dtype", None) or _stored_dtype(headers)
    tensors = _read_tensors(headers, {key for key, n in block_of.items() if n < layer}, dtype)
    kwargs: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    try:
        with guard_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **kwargs,
            )
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{source.name} cannot be loaded as a causal language model: {describe_error(error)}"
        ) from None
    compare_with_checkpoint(model, info, source.name)
    return model.to(device).eval().requires_grad_(False), name


def _model_class(folder: Path) -> "tuple[Any, Any, str, int] | None":
    """Class and config of the model in `folder`, name and number of its blocks by its structure.

    The model is built without memory. None if there are no blocks, or several lists of blocks whose
    names end alike.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with guard_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = auto.from_config(config)
    except Exception as error:  # `load_model` says what is wrong with this folder
        if is_out_of_memory(error):
            raise
        return None
    sizes = {
        name: sum(tensor.numel() for tensor in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not sizes:
        return None
    name = max(sizes, key=lambda key: (sizes[key], -len(key)))
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    last_names = Counter(key.rpartition(".")[2] for key in sizes)
    shared = len({id(p) for p in blocks.parameters()}) < sum(
        len(list(block.parameters())) for block in blocks
    )
    if last_names[name.rpartition(".")[2]] > 1 or shared:
        return None
    return type(model), config, name, len(blocks)


def _block_numbers(
    headers: dict[Path, dict[str, TensorEntry]], name: str, count: int
) -> dict[str, int] | None:
    """Tensor -> number of its block (from 0), for tensors of blocks; None if they are not `count`.

    A checkpoint may have another prefix than the model, so only the last part of `name` counts.
    """
    pattern = re.compile(rf"(?:^|\.){re.escape(name.rpartition('.')[2])}\.(\d+)\.")
    numbers = {
        key: int(match[1])
        for header in headers.values()
        for key in header
        if (match := pattern.search(key))
    }
    return numbers if set(numbers.values()) == set(range(count)) else None


def _stored_dtype(headers: dict[Path, dict[str, TensorEntry]]) -> "torch.dtype":
    """The floating-point dtype of most bytes: the model runs in it if its config names none."""
    import torch

    sizes: Counter[str] = Counter()
    for header in headers.values():
        for entry in header.values():
            if entry.dtype in RUNNING_DTYPES:
                sizes[RUNNING_DTYPES[entry.dtype]] += 1 + entry.span[1] - entry.span[0]
    return getattr(torch, max(sizes, key=lambda name: sizes[name], default="float32"))


def _read_tensors(
    headers: dict[Path, dict[str, TensorEntry]], lower: set[str], dtype: "torch.dtype"
) -> "dict[str, torch.Tensor]":
    """All tensors of the files, those of `lower` as repeated random numbers of `dtype`."""
    import torch
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for path, header in headers.items():
        with safe_open(path, "pt") as file:
            for key, entry in header.items():
                if key in lower and entry.dtype in RUNNING_DTYPES and entry.shape:
                    row = torch.randn(entry.shape[-1], generator=generator) * SPREAD
                    tensors[key] = row.to(dtype).expand(entry.shape)
                else:
                    tensors[key] = file.get_tensor(key)
    return tensors
