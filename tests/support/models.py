"""Tiny random causal models, tokenizers and texts for tests; no parameter has its default."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from residua.cache.model.transformers_guard import guard_transformers

VOCAB = 300
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neox": _LLAMA,
    "llama": _LLAMA,
    "gemma2": {**_LLAMA, "final_logit_softcapping": 3.0},
    "cohere": {**_LLAMA, "logit_scale": 0.3},
    "granite": {**_LLAMA, "logits_scaling": 3.0, "residual_multiplier": 0.7},
    "phi": _LLAMA,
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 128,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "nemotron": _LLAMA,
    "mixtral": _LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3},
    "glm": {**_LLAMA},
}
"""Model type -> configuration; together they have all kinds of norms, biases, scales, outputs."""


def build_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A causal model of `kind`, in eval mode, with noise added to every parameter."""
    torch.manual_seed(seed)
    marks = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCAB}
    config = CONFIG_MAPPING[kind](**{**CONFIGS[kind], **marks})
    with guard_transformers():
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(dtype).requires_grad_(False)


def save_model(folder: Path, kind: str = "gpt_neox", bos: bool = False, seed: int = 0) -> Path:
    """Save a model as transformers does, with a byte-level tokenizer; return `folder`."""
    model: Any = build_model(kind, seed=seed)
    with guard_transformers():
        model.save_pretrained(folder)
    build_tokenizer(bos).save_pretrained(folder)
    return folder


def build_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` tokens; with `bos` every text begins with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(40), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    mark = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token=mark)


def texts(number: int, seed: int = 0) -> list[str]:
    """Short documents of different lengths over a small set of words."""
    words = "the a cat dog sat ran on under mat tree and then it was big red blue house".split()
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(number)]
