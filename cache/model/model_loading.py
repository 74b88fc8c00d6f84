"""Loading of a frozen causal language model from safetensors, by transformers: `load_model`.

`extraction/prepare.py` and `extraction/repair.py` call it with a `ModelSource`. The loaded
parameters are compared with the checkpoint (`checkpoint_comparison.py`), because transformers fills
missing ones with random numbers.
"""

from typing import TYPE_CHECKING, Any

from ..devices import is_out_of_memory
from ..errors import ModelError
from ..optional_libraries import is_installed, missing_library
from .checkpoint_comparison import compare_with_checkpoint
from .config_check import check_config_size, describe_error
from .safetensors_header import read_header
from .source import ModelSource
from .transformers_guard import guard_transformers

if TYPE_CHECKING:
    import torch


DeviceMap = str | dict[str, Any]
"""`auto`, `balanced`, `sequential`, or module name -> device, as accelerate takes them."""
LOADING_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    RuntimeError,
    TypeError,
    AttributeError,
)
"""Errors of `from_pretrained` that mean an unusable model folder."""


def check_accelerate() -> None:
    """Raise `MissingLibraryError` unless accelerate is there: it spreads models over devices."""
    if not is_installed("accelerate"):
        raise missing_library("accelerate", "a device map")


def load_model(
    source: ModelSource,
    device: "str | torch.device" = "cpu",
    attention: str = "default",
    trust_remote_code: bool = False,
    *,
    device_map: "DeviceMap | None" = None,
) -> "torch.nn.Module":
    """The model of `source` on `device`: eval mode, no gradients, dtype of the checkpoint.

    With a `device_map` accelerate spreads the model instead: `auto` over all GPUs, then the memory
    of the host and the disk, whose blocks are brought to a GPU for each call; or module name ->
    device. Raises `MissingLibraryError` if accelerate is not installed.

    `attention` is transformers' `attn_implementation`, or `default`. Only safetensors are read;
    code that comes with a model runs only with `trust_remote_code`. The attribute
    `checkpoint_notes` of the model holds the result of `compare_with_checkpoint`. Raises
    `ModelError` if a file cannot be read or the checkpoint does not fill the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    architecture = (source.config.get("architectures") or [None])[0]
    if source.config.get("is_encoder_decoder") and not str(architecture).endswith("ForCausalLM"):
        raise ModelError(
            f"{source.name} is an encoder-decoder ({architecture or 'no architecture named'}), "
            "whose decoder reads another text through the encoder; expected a causal language "
            "model, a decoder alone"
        )

    # Check all weight files first: damaged ones are named.
    for path in source.weight_files:
        read_header(path)
    check_config_size(source.folder, source.config, source.weight_files, trust_remote_code)

    auto: Any = AutoModelForCausalLM
    kwargs: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    if device_map is not None:
        check_accelerate()
        kwargs["device_map"] = device_map
    try:
        with guard_transformers():
            module, info = auto.from_pretrained(
                source.folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **kwargs,
            )
    except (*LOADING_ERRORS, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = describe_error(error)
        if "Unrecognized configuration class" in reason:  # followed by all classes there are
            reason = _reason_of_class(source)
        if "CONVERSION" in reason:  # transformers refers to a report that is not shown
            reason = (
                "tensors that are packed together, such as those of all experts of a layer, do not "
                "go together: the checkpoint lacks one of them, or its shape differs; save the "
                "whole model anew with save_pretrained"
            )
        raise ModelError(
            f"{source.name} cannot be loaded as a causal language model: {reason}"
        ) from None
    notes = compare_with_checkpoint(module, info, source.name)
    if device_map is None:
        module = module.to(device)
    module = module.eval().requires_grad_(False)
    module.checkpoint_notes = notes
    return module


def _reason_of_class(source: ModelSource) -> str:
    """Why transformers has no causal language model for the configuration of `source`."""
    name = (source.config.get("architectures") or [source.config.get("model_type")])[0]
    if isinstance(source.config.get("vision_config"), dict):
        return (
            f"{name} reads images among its texts, and images in a text are not read; save its "
            "language model alone as a causal language model, or give a classifier of images "
            "(...ForImageClassification)"
        )
    return (
        f"transformers has none for {name} (model_type {source.config.get('model_type')!r}); "
        "expected a class ...ForCausalLM, or ...ForImageClassification with images"
    )


def checkpoint_tensors(
    module: "torch.nn.Module", tensors: "dict[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """`tensors` of the state dict of `module`, named and cut as its checkpoint has them.

    transformers renames and packs some tensors when it loads a model, and does the reverse when it
    saves one.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has the names of the checkpoint in the model
        return tensors
    revert: Any = revert_weight_conversion
    with guard_transformers():
        return revert(module, dict(tensors))
