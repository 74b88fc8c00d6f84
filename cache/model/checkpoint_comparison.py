"""Comparison of a loaded model with its checkpoint: missing, misshapen and unread tensors.

`from_pretrained` fills a parameter that the checkpoint lacks with random numbers, and drops a
tensor that fits nowhere, with a warning at most. `load_model` calls `compare_with_checkpoint`, for
which both are errors, except where residual streams and logits cannot change.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .model_devices import unfilled_tensors

if TYPE_CHECKING:
    import torch

COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids|masked_bias"
    r"|cos_cached|sin_cached|num_batches_tracked|embed_positions\.weights|final_logits_bias)$"
    r"|(^|\.)(attn|attention|self_attn)\.(bias|mask)$"
)
"""Names of buffers computed from the configuration: rotary frequencies, position numbers, causal
masks, sinusoidal positions."""
CACHE_SCALES = re.compile(r"\.(k|v|q|prob|kv)_scale$")
"""Names of scales of a quantized key-value cache; extraction uses no key-value cache."""
SURROUNDINGS = re.compile(r"(?i)(norm|embed|embd|wpe|wte|(^|_)ln|position)[^.]*(\.(weight|bias))?$")
"""Names of embeddings and norms, which the residual stream passes outside the blocks."""
COPY_SHARE = 0.5
"""Smallest share of the model's tensors, under a common prefix, to count as a copy of the model."""
MAX_NAMES = 4
"""Largest number of names in a message."""


def compare_with_checkpoint(
    model: "torch.nn.Module", info: dict[str, Any], name: str
) -> dict[str, list[str]]:
    """Raise `ModelError` if the checkpoint does not fill the model; return harmless differences.

    `info` is transformers' loading info. The result has two lists of names: `computed`, buffers
    that the checkpoint lacks, and `unused`, tensors of the checkpoint that the model does not
    read. The error names tensors that are missing, have another shape, or belong to blocks that
    the model lacks.
    """
    # Errors and shapes that transformers itself reports.
    errors = [str(error) for error in info.get("error_msgs") or ()]
    if errors:
        raise ModelError(f"{name} cannot be loaded: {errors[0].strip().splitlines()[0]}")
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        first = "; ".join(
            f"{tensor} is {tuple(actual)}, the model's is {tuple(expected)}"
            for tensor, actual, expected in mismatched[:MAX_NAMES]
        )
        # Experts of a layer are packed along the first axis.
        lacks_expert = any(
            len(actual) > 2 and actual[0] < expected[0] and tuple(actual[1:]) == tuple(expected[1:])
            for _, actual, expected in mismatched
        )
        lost = (
            "a tensor that is packed into them (of one expert) is lost, or " if lacks_expert else ""
        )
        raise ModelError(
            f"{name}: {len(mismatched)} tensors of the checkpoint have other shapes than its "
            f"config.json says: {first}{_count_more(mismatched)}; {lost}give the config.json that "
            "belongs to these weights"
        )

    # Tensors that the checkpoint lacks: only computed buffers may be among them.
    buffers = {key for key, _ in model.named_buffers()}
    missing: list[str] = sorted(info.get("missing_keys") or ())
    unexpected: list[str] = sorted(info.get("unexpected_keys") or ())
    computed = [key for key in missing if key in buffers and COMPUTED.search(key)]
    if lacking := sorted({*missing} - {*computed}):
        raise ModelError(
            f"{name}: the checkpoint lacks {len(lacking)} of the model's tensors: "
            f"{_first_names(lacking)}; transformers would draw them at random. "
            f"{_advice_on_missing(model, lacking, unexpected)}"
        )
    _check_filled(model)

    # Tensors of the checkpoint that the model does not read.
    _check_unexpected(model, unexpected, name)
    return {"computed": computed, "unused": unexpected}


def _check_filled(model: "torch.nn.Module") -> None:
    """Raise `ModelError` if a tensor has a shape but no numbers (device `meta`)."""
    if empty := sorted(unfilled_tensors(model)):
        raise ModelError(
            f"{type(model).__name__}: {len(empty)} tensors were never filled: "
            f"{_first_names(empty)}; load the model once with transformers to see why"
        )


def _check_unexpected(model: "torch.nn.Module", unexpected: list[str], name: str) -> None:
    """Raise `ModelError` for tensors of this model in the checkpoint that no module reads.

    Tensors of other parts (an image tower, the head of another task, layers that predict several
    tokens) are accepted: residual streams and logits do not depend on them.
    """
    names = [key for key, _ in (*model.named_parameters(), *model.named_buffers())]
    patterns = {_without_numbers(key) for key in names}
    blocks = _block_prefixes(model)
    owners = {key.rpartition(".")[0] for key in names}
    containers = {"", *(prefix.rpartition(".")[0] for prefix in blocks)}
    copies = _copied_prefixes(names, unexpected)
    predictors = _predictor_layers(model)

    # Sort the tensors by the reason to refuse them.
    refused: dict[str, list[str]] = {}
    for key in unexpected:
        owner = key.rpartition(".")[0]
        container, local_name = _split_container(key, containers)
        if COMPUTED.search(key) or CACHE_SCALES.search(key):
            continue
        if any(key.startswith(f"{prefix}.") for prefix in copies):
            reason = "belong to a second copy of the model"
        elif any(key.startswith(f"{prefix}.{n}.") for prefix in blocks for n in predictors):
            continue  # layers that predict further tokens, named in the configuration
        elif any(re.match(rf"{re.escape(prefix)}\.\d+\.", key) for prefix in blocks):
            reason = "belong to blocks, or parts of blocks, that the model does not have"
        elif _without_numbers(key) in patterns or (owner and owner in owners):
            reason = "belong to modules of the model that do not read them"
        elif (
            local_name.count(".") <= 1
            and SURROUNDINGS.search(local_name)
            and container in containers
        ):
            reason = "look like embeddings or norms that the model does not have"
        else:
            continue
        refused.setdefault(reason, []).append(key)
    for reason, keys in refused.items():
        raise ModelError(
            f"{name}: {len(keys)} tensors of the checkpoint {reason}: "
            f"{_first_names(keys)}; the config.json describes another model (fewer layers, no "
            "biases, an adapter that was not merged). Give the config.json that belongs to these "
            "weights, or save the model anew with save_pretrained"
        )


def _advice_on_missing(model: Any, missing: list[str], unexpected: list[str]) -> str:
    """Advice to the user on missing tensors, by the unexpected tensors of the checkpoint."""
    names = [key for key, _ in model.named_parameters()]
    if prefixes := sorted({*_copied_prefixes(names, unexpected)}):
        return (
            f"It has them under names that begin with '{prefixes[0]}.': save the weights without "
            "this prefix"
        )
    prefix = str(getattr(model, "base_model_prefix", ""))
    is_only_head = bool(prefix) and not any(key.startswith(f"{prefix}.") for key in missing)
    if is_only_head or not missing:
        return (
            "It is a model without its language-model head: give the whole causal language model, "
            "or set tie_word_embeddings in config.json if the head is the embedding"
        )
    return (
        "Expected every tensor of the model that config.json describes: save the whole model anew "
        "with save_pretrained, or give the config.json that belongs to these weights"
    )


def _copied_prefixes(model_names: Iterable[str], unexpected: list[str]) -> list[str]:
    """Prefixes p for which most of the model's names, as `p.name`, are unexpected tensors."""
    names = set(model_names)
    counts: dict[str, int] = {}
    for key in unexpected:
        parts = key.split(".")
        for first in range(1, len(parts)):
            if ".".join(parts[first:]) in names:
                prefix = ".".join(parts[:first])
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    return [prefix for prefix, count in counts.items() if count >= COPY_SHARE * len(names)]


def _block_prefixes(model: "torch.nn.Module") -> set[str]:
    """Names of the outermost module lists, which hold the blocks."""
    from torch import nn

    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return {name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)}


def _predictor_layers(model: Any) -> list[int]:
    """Numbers of layers after the last block for multi-token prediction."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    predictors = getattr(config, "num_nextn_predict_layers", None)
    if not (isinstance(depth, int) and isinstance(predictors, int)):
        return []
    return list(range(depth, depth + predictors))


def _split_container(key: str, containers: set[str]) -> tuple[str, str]:
    """The longest of `containers` that is a prefix of `key`, and the name inside the container."""
    container = max((c for c in containers if not c or key.startswith(f"{c}.")), key=len)
    return container, key[len(container) + 1 :] if container else key


def _without_numbers(key: str) -> str:
    """A tensor's name with `*` instead of numbers of blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def _first_names(names: list[str]) -> str:
    """At most `MAX_NAMES` names for a message, and the number of further names."""
    return ", ".join(names[:MAX_NAMES]) + _count_more(names)


def _count_more(names: list[Any]) -> str:
    return f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
