"""Compares a loaded model with its checkpoint: parameters that no file gave are random numbers.

`from_pretrained` draws what it misses and drops what it cannot place, with a warning at most.
Here both are errors, but for what cannot change residual streams and logits.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids|masked_bias"
    r"|cos_cached|sin_cached|num_batches_tracked|embed_positions\.weights|final_logits_bias)$"
    r"|(^|\.)(attn|attention|self_attn)\.(bias|mask)$"
)
"""Names of buffers that the class computes from its configuration: rotary frequencies, numbers of
positions, causal masks, sinusoidal positions."""
CACHE_SCALES = re.compile(r"\.(k|v|q|prob|kv)_scale$")
"""Scales of a quantized key-value cache; extraction keeps none."""
SURROUNDINGS = re.compile(r"(?i)(norm|embed|embd|wpe|wte|(^|_)ln|position)[^.]*(\.(weight|bias))?$")
"""Parts beside the blocks that the stream would pass: embeddings, positions, norms."""
COPY_SHARE = 0.5
"""Share of the model's tensors that must be there under one prefix to make a copy of the model."""
SHOWN = 4
"""Names that a message shows."""


def compare_with_checkpoint(
    model: "torch.nn.Module", info: dict[str, Any], name: str
) -> dict[str, list[str]]:
    """Refuse a model that its checkpoint does not fill; `info`: transformers' loading info.

    Returns the names that are harmless: `computed`, buffers that the checkpoint lacks, and
    `unused`, tensors of the checkpoint that the model does not read. Raises `ModelError` with the
    names of tensors that are missing, have another shape, or belong to blocks that the model lacks.
    """
    errors = [str(error) for error in info.get("error_msgs") or ()]
    if errors:
        raise ModelError(f"{name} cannot be loaded: {errors[0].strip().splitlines()[0]}")
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        first = "; ".join(
            f"{tensor} is {tuple(found)}, the model's is {tuple(expected)}"
            for tensor, found, expected in mismatched[:SHOWN]
        )
        packed = any(
            len(found) > 2 and found[0] < expected[0] and tuple(found[1:]) == tuple(expected[1:])
            for _, found, expected in mismatched
        )
        lost = "a tensor that is packed into them (of one expert) is lost, or " if packed else ""
        raise ModelError(
            f"{name}: {len(mismatched)} tensors of the checkpoint have other shapes than its "
            f"config.json says: {first}{_more(mismatched)}; {lost}give the config.json that "
            "belongs to these weights"
        )
    buffers = {key for key, _ in model.named_buffers()}
    missing: list[str] = sorted(info.get("missing_keys") or ())
    unexpected: list[str] = sorted(info.get("unexpected_keys") or ())
    computed = [key for key in missing if key in buffers and COMPUTED.search(key)]
    if lacking := sorted({*missing} - {*computed}):
        raise ModelError(
            f"{name}: the checkpoint lacks {len(lacking)} of the model's tensors: {_few(lacking)}; "
            f"transformers would draw them at random. {_advice(model, lacking, unexpected)}"
        )
    _check_placed(model)
    _check_unexpected(model, unexpected, name)
    return {"computed": computed, "unused": unexpected}


def _check_placed(model: "torch.nn.Module") -> None:
    """Refuse tensors that have a shape and no numbers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := sorted(key for key, tensor in tensors if tensor.is_meta):
        raise ModelError(
            f"{type(model).__name__}: {len(empty)} tensors were never filled: {_few(empty)}; load "
            "the model once with transformers to see why"
        )


def _check_unexpected(model: "torch.nn.Module", unexpected: list[str], name: str) -> None:
    """Refuse what the checkpoint holds of this model and the model does not read.

    What lies elsewhere (an image tower, a task's head, layers that predict several tokens) is read
    by no module of the model: residual streams and logits do not depend on it.
    """
    known = [key for key, _ in (*model.named_parameters(), *model.named_buffers())]
    patterns = {_without_numbers(key) for key in known}
    blocks = _block_prefixes(model)
    owners = {key.rpartition(".")[0] for key in known}
    containers = {"", *(prefix.rpartition(".")[0] for prefix in blocks)}
    copies = _copied_prefixes(known, unexpected)
    predictors = _predictor_layers(model)
    refused: dict[str, list[str]] = {}
    for key in unexpected:
        owner = key.rpartition(".")[0]
        container, _, rest = _split_container(key, containers)
        if COMPUTED.search(key) or CACHE_SCALES.search(key):
            continue
        if any(key.startswith(f"{prefix}.") for prefix in copies):
            kind = "belong to a second copy of the model"
        elif any(key.startswith(f"{prefix}.{n}.") for prefix in blocks for n in predictors):
            continue  # further predictions, which the configuration names
        elif any(re.match(rf"{re.escape(prefix)}\.\d+\.", key) for prefix in blocks):
            kind = "belong to blocks, or parts of blocks, that the model does not have"
        elif _without_numbers(key) in patterns or (owner and owner in owners):
            kind = "belong to modules of the model that do not read them"
        elif rest.count(".") <= 1 and SURROUNDINGS.search(rest) and container in containers:
            kind = "look like embeddings or norms that the model does not have"
        else:
            continue
        refused.setdefault(kind, []).append(key)
    for kind, keys in refused.items():
        raise ModelError(
            f"{name}: {len(keys)} tensors of the checkpoint {kind}: {_few(keys)}; the config.json "
            "describes another model (fewer layers, no biases, an adapter that was not merged). "
            "Give the config.json that belongs to these weights, or save the model anew with "
            "save_pretrained"
        )


def _advice(model: Any, missing: list[str], unexpected: list[str]) -> str:
    """What to do about missing tensors, by what the checkpoint has instead."""
    known = [key for key, _ in model.named_parameters()]
    if prefixes := sorted({*_copied_prefixes(known, unexpected)}):
        return (
            f"It has them under names that begin with '{prefixes[0]}.': save the weights without "
            "this prefix"
        )
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = [key for key in missing if key.startswith(f"{prefix}.")] if prefix else missing
    if not inside:
        return (
            "It is a model without its language-model head: give the whole causal language model, "
            "or set tie_word_embeddings in config.json if the head is the embedding"
        )
    return (
        "Expected every tensor of the model that config.json describes: save the whole model anew "
        "with save_pretrained, or give the config.json that belongs to these weights"
    )


def _copied_prefixes(known: Iterable[str], unexpected: list[str]) -> list[str]:
    """Prefixes under which most of the model's tensors are among the unexpected ones."""
    names, counts = set(known), dict[str, int]()
    for key in unexpected:
        parts = key.split(".")
        for first in range(1, len(parts)):
            if ".".join(parts[first:]) in names:
                prefix = ".".join(parts[:first])
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    return [prefix for prefix, count in counts.items() if count >= COPY_SHARE * len(names)]


def _block_prefixes(model: "torch.nn.Module") -> set[str]:
    """Names of the lists of blocks: module lists with parameters that lie in no other list."""
    from torch import nn

    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    return {n for n in lists if not any(n.startswith(f"{other}.") for other in lists)}


def _predictor_layers(model: Any) -> list[int]:
    """Numbers of the layers behind the last block that predict further tokens (MTP)."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    more = getattr(config, "num_nextn_predict_layers", None)
    if not (isinstance(depth, int) and isinstance(more, int)):
        return []
    return list(range(depth, depth + more))


def _split_container(key: str, containers: set[str]) -> tuple[str, str, str]:
    """The longest of `containers` that `key` lies in, a dot, and the rest of the name."""
    found = max((c for c in containers if not c or key.startswith(f"{c}.")), key=len)
    return found, ".", key[len(found) + 1 :] if found else key


def _without_numbers(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + _more(names)


def _more(names: list[Any]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
