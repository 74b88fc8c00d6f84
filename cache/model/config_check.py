"""Checks of config.json before a model is built: readable, and of the size of its weights.

A configuration of a stranger can describe a model of any size. transformers would build all layers
and allocate tensors that the checkpoint lacks, before it compares them.
"""

import math
from pathlib import Path
from typing import Any

from ..devices import is_out_of_memory
from ..errors import ModelError
from .safetensors_header import read_header
from .transformers_guard import guard_transformers

MOST_LAYERS = 1024
"""Layers that are built in any case: some models use one layer's tensors several times."""
PACKED_VALUES = 16
"""Most parameters of a model per stored value: packed integers hold several, ties share some."""
FREE_VALUES = 1 << 24
"""Parameters that a model may have whatever its checkpoint holds."""
FREE_BUFFER_VALUES = 1 << 28
"""Values of buffers, such as causal masks, that a model may have beside those of its weights."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
"""Names of the number of layers in configurations."""


def describe_error(error: Exception) -> str:
    """The first two lines of an error's message in one line, or the error's type."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__


def check_config_readable(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise `ModelError` if transformers cannot read the configuration in `folder`."""
    from transformers import AutoConfig

    try:
        with guard_transformers():
            AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a validator of any configuration may raise anything
        raise ModelError(
            f"{folder}/config.json cannot be used: {describe_error(error)}; expected the "
            "configuration of a model, as save_pretrained writes it"
        ) from None


def check_config_size(
    folder: Path,
    config: dict[str, Any],
    weight_files: list[Path],
    trust_remote_code: bool = False,
    model_class: str = "AutoModelForCausalLM",
) -> None:
    """Raise `ModelError` if config.json describes a far larger model than the weights hold.

    `config` is the content of config.json in `folder`. The model, of `model_class` of transformers,
    is built without memory for its tensors. A configuration that cannot be built so is left to
    `from_pretrained`, which says why.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    headers = [read_header(path) for path in weight_files]
    shapes = [entry.shape for header in headers for entry in header.values()]
    stored = sum(math.prod(shape) for shape in shapes)
    _check_layers(folder, config, len(shapes))
    auto: Any = getattr(transformers, model_class)
    try:
        with guard_transformers():
            loaded_config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            with torch.device("meta"):
                model = auto.from_config(loaded_config, trust_remote_code=trust_remote_code)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return
    parameters = sum(tensor.numel() for tensor in model.parameters())
    buffers = sum(tensor.numel() for tensor in model.buffers())
    allowed = PACKED_VALUES * stored + FREE_VALUES
    if parameters > allowed or buffers > allowed + FREE_BUFFER_VALUES:
        raise ModelError(
            f"{folder}/config.json describes a model of {max(parameters, buffers):,} values, "
            f"its weights hold {stored:,}; give the config.json that belongs to these weights"
        )


def _check_layers(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise `ModelError` for more layers than the checkpoint has tensors."""
    composite = config.get("text_config")
    for part in (config, composite if isinstance(composite, dict) else {}):
        for name in _LAYER_COUNTS:
            layers = part.get(name)
            if isinstance(layers, int) and layers > max(tensors, MOST_LAYERS):
                raise ModelError(
                    f"{folder}/config.json says {name} = {layers:,}, its weights have {tensors} "
                    "tensors; give the config.json that belongs to these weights"
                )
