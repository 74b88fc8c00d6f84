"""Tiny random models of every causal language model class of transformers, by shrinking configs.

Integer fields are made small by their name, per-layer lists keep every kind of layer, scalar
constants leave their defaults, every parameter gets noise. `BY_HAND` holds what no rule can know.
"""

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from residua.cache.model.transformers_guard import guard_transformers

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
    (
        r"hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_dim|hidden_dim|dim_model|lru_width",
        64,
    ),
    (r"word_embed_proj_dim|.*embedding_size|attention_hidden_size|.*_embed_dim|embed_dim", 64),
    (r".*(intermediate|ffn|inner|feed_forward|mid).*(size|dim)|dff|dim_ff|d_inner", 96),
    (r".*_rank", 16),
    (r"(n_routed|num|num_local|moe_num|.*)_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|.*top_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*positions?(_embeddings)?|n_ctx|max_seq_len|context_length", 512),
    (r"state_size|.*d_state|ssm_state_size", 16),
    # Shorter than the sequences of the tests, so that windows, chunks and sparse choices bite.
    (r"sliding_window(_size)?|(attention_)?window_size|local_attention|index_topk", 16),
    (r"(mamba_)?chunk_size|attention_chunk_size", 16),
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
_UNSET = r"num_experts_per_tok|n_routed_experts|head_dim|num_key_value_heads|indexer_.*|.*_experts"
"""Fields that some classes leave at None although the model needs them."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QSA = {
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
BY_HAND: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 200, "patching_threshold": 4.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
}
"""What no rule can know, per model type."""
SAME_TEXT = {"dots3_note": "dots3_note_text"}
"""Composite types that are built from the config of their text model."""


def shrink(config: PretrainedConfig, hand: dict[str, Any] | None = None) -> PretrainedConfig:
    """A config of the same class with small fields; `hand` wins over the rules."""
    hand = hand or {}
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    new = dict(_scalars(fields))
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            new[name] = shrink(value, hand.get(name)).to_dict()
    # What is equal in the default stays equal: a rotary width that is also the head's.
    if fields.get("qk_rope_head_dim") == fields.get("head_dim") is not None:
        new["head_dim"] = new["qk_rope_head_dim"]
    keep = _kept_layers(fields)
    new.update(_lists(fields, keep))
    if spec := getattr(config, "_heterogeneity_spec", None):
        own = spec.per_layer_overrides
        kept = [n for n in keep if n in own]
        new["per_layer_config"] = {keep.index(n): dict(_scalars(own[n])) for n in kept}
    new.update({k: v for k, v in hand.items() if not isinstance(fields.get(k), PretrainedConfig)})
    return type(config)(**new)


def _scalars(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            heads = name == "num_key_value_heads" and value == fields.get("num_attention_heads")
            small = _integer("num_attention_heads" if heads else name, value)
            if small != value:
                yield name, small
        elif value is None and re.fullmatch(_UNSET, name):
            yield name, _integer(name, 4)
        elif name in SCALARS:
            yield name, SCALARS[name]
        elif isinstance(value, float) and "eps" in name:
            yield name, 3e-4


def _integer(name: str, value: int) -> int:
    if name.endswith(("token_id", "_index")):
        return value if 0 <= value < VOCAB else VOCAB - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Numbers of `DEPTH` layers, among them one of every kind that the per-layer lists know."""
    depth = next((v for k, v in fields.items() if re.fullmatch(_LAYERS, k)), 0)
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == depth]
    first: dict[str, int] = {}
    for number in range(depth):
        first.setdefault(repr([values[number] for values in lists]), number)
    kinds = list(first.values())[:DEPTH]
    rest = [n for n in range(depth) if n not in kinds]
    return sorted([*kinds, *rest[: DEPTH - len(kinds)]])


def _lists(fields: dict[str, Any], keep: list[int]) -> Iterator[tuple[str, Any]]:
    depth = next((v for k, v in fields.items() if re.fullmatch(_LAYERS, k)), 0)
    for name, values in fields.items():
        if isinstance(values, list | tuple) and len(values) == depth > DEPTH:
            small = name.removesuffix("_per_layer")
            chosen = [values[n] for n in keep]
            yield name, [_integer(small, v) if type(v) is int else v for v in chosen]


def tiny_config(kind: str, **fields: Any) -> PretrainedConfig:
    """The small config of a model type, with `fields` as given."""
    kind = SAME_TEXT.get(kind, kind)
    return shrink(CONFIG_MAPPING[kind](), {**BY_HAND.get(kind, {}), **fields})


def build_architecture(
    kind: str, seed: int = 0, noise: float = 0.1, **fields: Any
) -> torch.nn.Module:
    """A causal model of type `kind` in eval mode, every parameter off its initial value."""
    torch.manual_seed(seed)
    config, mapping = tiny_config(kind, **fields), cast(Any, AutoModelForCausalLM._model_mapping)
    with guard_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except AttributeError:  # the class reads the config of a part: of the decoder, of the text
            config = config.get_text_config(decoder=True)
            model = mapping[CONFIG_MAPPING[kind]](config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.eval().requires_grad_(False)
