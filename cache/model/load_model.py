"""The only door to transformers: loads a frozen causal language model and its tokenizer."""

from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .checkpoint_comparison import compare_with_checkpoint
from .memory import is_out_of_memory
from .safetensors_header import read_header
from .source import ModelSource
from .transformers_guard import guard_transformers

if TYPE_CHECKING:
    import torch


def choose_device(device: str) -> str:
    """`auto` is the first GPU if there is one, else the CPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {error}") from None
    return device


def load_model(
    source: ModelSource,
    device: str = "cpu",
    attention: str = "default",
    trust_remote_code: bool = False,
) -> "torch.nn.Module":
    """The model in eval mode, without gradients, in the dtype of its checkpoint.

    Only safetensors are read. Code that comes with a model runs only if `trust_remote_code`.
    Raises `ModelError` where a file cannot be read, or the checkpoint does not fill the model;
    what it holds besides is in the attribute `checkpoint_notes` of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    for path in source.weight_files:
        read_header(path)
    auto: Any = AutoModelForCausalLM
    kwargs: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    try:
        with guard_transformers():
            module, info = auto.from_pretrained(
                source.folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **kwargs,
            )
    except (
        OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError,
        SafetensorError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "CONVERSION" in reason:  # the report that it speaks of is not shown
            reason = (
                "tensors that are packed together, such as those of all experts of a layer, do not "
                "go together: the checkpoint lacks one of them, or its shape differs; save the "
                "whole model anew with save_pretrained"
            )
        raise ModelError(
            f"{source.name} cannot be loaded as a causal language model: {reason}"
        ) from None
    notes = compare_with_checkpoint(module, info, source.name)
    module = module.to(device).eval().requires_grad_(False)
    module.checkpoint_notes = notes
    return module
