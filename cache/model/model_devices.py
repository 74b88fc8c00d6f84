"""Devices of a loaded model, which may be spread over several: where ids go, where weights are.

`load_model` spreads a model with `device_map` through accelerate: its hooks bring the weights of an
offloaded module (from the host's memory or a disk) to the module's device for each call, and its
inputs with them. Everything else asks here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def input_device(model: "torch.nn.Module") -> "torch.device":
    """The device that token ids go to: that of the token embedding, or of the first parameter."""
    import torch

    get_embedding = getattr(model, "get_input_embeddings", lambda: None)
    try:
        embedding = get_embedding()
    except NotImplementedError:
        embedding = None
    modules = [model] if embedding is None else [embedding, model]
    for module in modules:
        for hook in _hooks(module):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
        for parameter in module.parameters():
            if not is_offloaded(module) and not parameter.is_meta:
                return parameter.device
    return next(model.parameters()).device


def device_names(model: "torch.nn.Module") -> str:
    """Names of all devices that hold a part of the model, for people: `cuda:0, cuda:1, disk`."""
    device_map: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if not device_map:
        return str(input_device(model))
    devices = dict.fromkeys(
        f"cuda:{device}" if isinstance(device, int) else str(device)
        for device in device_map.values()
    )
    return ", ".join(devices)


def is_offloaded(module: "torch.nn.Module") -> bool:
    """Whether the weights of `module` itself come from elsewhere for each call."""
    return any(getattr(hook, "weights_map", None) is not None for hook in _hooks(module))


def loaded_tensor(module: "torch.nn.Module", name: str) -> "torch.Tensor":
    """A parameter or buffer of `module` itself with its numbers, those of an offloaded one too."""
    tensor = module._parameters.get(name)
    tensor = module._buffers[name] if tensor is None else tensor
    assert tensor is not None
    if tensor.is_meta:
        for hook in _hooks(module):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                return weights[name].to(tensor.dtype)
    return tensor


def loaded_parameters(model: "torch.nn.Module") -> Iterator["torch.Tensor"]:
    """The parameters of `model` with their numbers, those of offloaded modules too; each once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield loaded_tensor(module, name)


def unfilled_tensors(model: "torch.nn.Module") -> list[str]:
    """Names of tensors that have a shape but no numbers, here or where they are offloaded to."""
    return [
        f"{prefix}.{name}".strip(".")
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.is_meta and not is_offloaded(module)
    ]


def _hooks(module: "torch.nn.Module") -> list[Any]:
    """The hooks of accelerate at `module`: none, one, or those of a sequence."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", (hook,)))
