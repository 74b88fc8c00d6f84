"""Tiny random models of every causal language model class of transformers, by shrinking configs.

Integer fields are made small by their name, per-layer lists keep every kind of layer, scalar
constants leave their defaults, every parameter gets noise. `BY_HAND` holds fields that need a value
outside the rules.
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
"""Pattern of an integer field's name -> largest value; the first match applies."""
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
"""Fields outside the rules, per model type."""
SAME_TEXT = {"dots3_note": "dots3_note_text"}
"""Composite types built from the config of their text model."""


def shrink(config: PretrainedConfig, by_hand: dict[str, Any] | None = None) -> PretrainedConfig:
    """A config of the same class with small fields; fields in `by_hand` override the rules."""
    by_hand = by_hand or {}
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    small = dict(_small_scalars(fields))
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            small[name] = shrink(value, by_hand.get(name)).to_dict()
    # Fields that are equal by default stay equal: rotary width and width of a head.
    if fields.get("qk_rope_head_dim") == fields.get("head_dim") is not None:
        small["head_dim"] = small["qk_rope_head_dim"]
    layers = _representative_layers(fields)
    small.update(_small_lists(fields, layers))
    if spec := getattr(config, "_heterogeneity_spec", None):
        overrides = spec.per_layer_overrides
        small["per_layer_config"] = {
            number: dict(_small_scalars(overrides[layer]))
            for number, layer in enumerate(layers)
            if layer in overrides
        }
    small.update(
        {k: v for k, v in by_hand.items() if not isinstance(fields.get(k), PretrainedConfig)}
    )
    return type(config)(**small)


def _small_scalars(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and new value of each scalar field that changes."""
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            heads = name == "num_key_value_heads" and value == fields.get("num_attention_heads")
            small = _small_integer("num_attention_heads" if heads else name, value)
            if small != value:
                yield name, small
        elif value is None and re.fullmatch(_UNSET, name):
            yield name, _small_integer(name, 4)
        elif name in SCALARS:
            yield name, SCALARS[name]
        elif isinstance(value, float) and "eps" in name:
            yield name, 3e-4


def _small_integer(name: str, value: int) -> int:
    """`value` of an integer field, reduced by the first rule for its name."""
    if name.endswith(("token_id", "_index")):
        return value if 0 <= value < VOCAB else VOCAB - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _representative_layers(fields: dict[str, Any]) -> list[int]:
    """Numbers of `DEPTH` layers, among them one of every kind in the per-layer lists."""
    depth = next((v for k, v in fields.items() if re.fullmatch(_LAYERS, k)), 0)
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == depth]
    first: dict[str, int] = {}
    for number in range(depth):
        first.setdefault(repr([values[number] for values in lists]), number)
    kinds = list(first.values())[:DEPTH]
    others = [number for number in range(depth) if number not in kinds]
    return sorted([*kinds, *others[: DEPTH - len(kinds)]])


def _small_lists(fields: dict[str, Any], layers: list[int]) -> Iterator[tuple[str, Any]]:
    """Yield name and new value of each per-layer list, reduced to `layers`."""
    depth = next((v for k, v in fields.items() if re.fullmatch(_LAYERS, k)), 0)
    for name, values in fields.items():
        if isinstance(values, list | tuple) and len(values) == depth > DEPTH:
            scalar_name = name.removesuffix("_per_layer")
            yield (
                name,
                [
                    _small_integer(scalar_name, value) if type(value) is int else value
                    for value in (values[layer] for layer in layers)
                ],
            )


def tiny_config(kind: str, **fields: Any) -> PretrainedConfig:
    """The small config of a model type, with the given `fields`."""
    kind = SAME_TEXT.get(kind, kind)
    return shrink(CONFIG_MAPPING[kind](), {**BY_HAND.get(kind, {}), **fields})


def build_architecture(
    kind: str, seed: int = 0, noise: float = 0.1, **fields: Any
) -> torch.nn.Module:
    """A causal model of type `kind` in eval mode, with noise added to every parameter."""
    torch.manual_seed(seed)
    config, mapping = tiny_config(kind, **fields), cast(Any, AutoModelForCausalLM._model_mapping)
    with guard_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except AttributeError:  # the class expects the config of its decoder or text part
            config = config.get_text_config(decoder=True)
            model = mapping[CONFIG_MAPPING[kind]](config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.eval().requires_grad_(False)
