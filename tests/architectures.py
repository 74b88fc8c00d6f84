"""Tiny random models of every causal language model class of transformers, by shrinking configs.

Integer fields are made small by their name, per-layer lists keep every kind of layer, scalar
constants leave their defaults, every parameter gets noise. `BY_HAND` holds what no rule can know.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from residua.cache.model import quiet

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 160
DEPTH = 4
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(en|de)coder_layers"
RULES: tuple[tuple[str, int], ...] = (
    (_LAYERS, DEPTH),
    (r"num_layers_per_stack", 2),
    (r"(?!type_).*vocab.*", VOCAB),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_head|n_groups|(.*_)?heads|index_n_heads|linear_num_.*", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 8),
    (r".*head_?dim|.*head_size|kv_channels|dim_head|d_head|mamba_d_head", 16),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|hidden_dim|dim_model|lru_width", 64),
    (r"word_embed_proj_dim|.*embedding_size|attention_hidden_size|.*_embed_dim|embed_dim", 64),
    (r".*(intermediate|ffn|inner|feed_forward|mid).*(size|dim)|dff|dim_ff|d_inner", 96),
    (r".*_rank", 16),
    (r"(n_routed|num|num_local|moe_num|.*)_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|.*top_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*positions?(_embeddings)?|n_ctx|max_seq_len|context_length", 512),
    (r"state_size|.*d_state|ssm_state_size", 16),
    (r"router_hidden_size|.*_per_layer_input|proj_.*", 16),
)
"""Name of an integer field -> its value where the default is larger; the first match wins."""
SCALARS: dict[str, float] = {
    "final_logit_softcapping": 2.0,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.7,
    "output_logit_soft_cap": 3.0,
    "logits_soft_cap": 2.0,
}
BY_HAND: dict[str, dict[str, Any]] = {}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class with small fields."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    new: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            new[name] = shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            new[name] = _integer(name, value)
        elif name in SCALARS:
            new[name] = SCALARS[name]
        elif isinstance(value, float) and "eps" in name:
            new[name] = 3e-4
    if "kv_lora_rank" in new and "num_key_value_heads" in new:
        new["num_key_value_heads"] = new["num_attention_heads"]
    new.update(_lists(fields))
    return type(config)(**{k: v for k, v in new.items() if v != fields[k]})


def _integer(name: str, value: int) -> int:
    if name.endswith(("token_id", "_index")):
        return value if 0 <= value < VOCAB else VOCAB - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _lists(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Per-layer lists, cut alike so that every kind of layer is kept."""
    depth = next((v for k, v in fields.items() if re.fullmatch(_LAYERS, k)), 0)
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == depth}
    rows = list(zip(*lists.values(), strict=True))
    if depth <= DEPTH or not rows:
        return
    first = sorted({repr(row): n for n, row in reversed(list(enumerate(rows)))}.values())[:DEPTH]
    rest = [n for n in range(depth) if n not in first]
    keep = sorted([*first, *rest[: DEPTH - len(first)]])
    for name, values in lists.items():
        yield name, [_integer(name.removesuffix("_per_layer"), values[n])
                     if type(values[n]) is int else values[n] for n in keep]


def tiny_config(kind: str) -> PretrainedConfig:
    """The small config of a model type."""
    config = shrink(CONFIG_MAPPING[kind]())
    for name, value in BY_HAND.get(kind, {}).items():
        setattr(config, name, copy.deepcopy(value))
    return config


def build(kind: str, seed: int = 0, noise: float = 0.1) -> torch.nn.Module:
    """A causal model of type `kind` in eval mode, every parameter off its initial value."""
    torch.manual_seed(seed)
    with quiet():
        model: Any = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.eval().requires_grad_(False)
