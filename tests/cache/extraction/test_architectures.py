"""Every causal language model class of transformers extracts with its own head, or is refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import residua
from residua.cache.checks.model_checks import check_model
from residua.cache.errors import ModelError
from residua.cache.model.blocks import run_model
from residua.cache.tokens.token_stream import from_sequences

from ...support import models
from ...support.architectures import KINDS, build_architecture
from ...support.conformance import TOLERANCE, Verdict, check_architecture, random_stream

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
# fmt: off
FAST = (
    # tensor and tuple outputs, plain and (1 + w) norms, layer norms, no norm at the end
    "llama", "gpt2", "gpt_neox", "gemma", "bloom", "mpt", "opt", "phi", "gptj", "bart",
    "openai-gpt",
    # softcap, logit scales before and after the unembedding, multipliers
    "gemma2", "cohere", "granite", "minicpm3", "falcon_h1", "nanochat",
    # experts, latent attention, recurrences, blocks of several classes, loops, skipped blocks
    "mixtral", "deepseek_v3", "mamba", "rwkv", "jamba", "recurrent_gemma", "hrm_text", "mllama",
    # heads with a transform, several streams, other axis orders, added or repeated positions
    "bert", "roberta", "modernbert-decoder", "deepseek_v4", "hy_v4", "gemma3n_text", "xlnet",
    "cpmant", "prophetnet", "reformer", "xlm", "blt",
    # logits that depend on earlier blocks; audio codes in place of tokens
    "inkling2_text", "musicgen",
)
# fmt: on
REFUSED = {
    "inkling2_text": "not a function of the last block's output alone",
    "musicgen": "no single token embedding",
    "musicgen_melody": "no single token embedding",
}
"""Refused, with a part of the reason."""
NOT_BUILT = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant"}
"""Need the timm library, or another model's key-value cache."""
NOT_RESUMED = {"cpmant", "gemma3n_text", "hy_v4", "zaya"}
"""Carry more than the stream from block to block: some layers are refused to be resumed."""
VARIANTS: dict[str, tuple[str, dict]] = {
    "bert, decoder": ("bert", {"is_decoder": True}),
    "roformer, decoder": ("roformer", {"is_decoder": True}),
    "opt, post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 32}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "bart, scaled": ("bart", {"scale_embedding": True}),
}
"""Switches of common classes that change what surrounds the stack."""
OFFLINE = """
import sys, numpy as np
from pathlib import Path
from residua.cache.head.saved_head import load_head
for folder in sorted(Path(sys.argv[1]).iterdir()):
    head, rows = load_head(folder), np.load(folder / "rows.npz")
    logits = rows["logits"]
    error = np.abs(head.logits(rows["hidden"]) - logits).max()
    assert error <= float(sys.argv[2]) * np.abs(logits).max(), (folder.name, error)
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


def check(verdict: Verdict) -> None:
    expected = "refused" if verdict.kind in REFUSED else "extracted"
    assert verdict.status == expected, verdict
    assert REFUSED.get(verdict.kind, "") in verdict.reason
    assert verdict.error <= TOLERANCE
    assert verdict.resume_error <= TOLERANCE
    if expected == "extracted":
        assert bool(verdict.not_resumed) == (verdict.kind in NOT_RESUMED), verdict
        assert not {0, verdict.depth} & {*verdict.not_resumed}


@pytest.mark.parametrize("kind", [kind for kind in FAST if kind in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_a_head_gives_the_models_logits_after_the_model_is_poisoned(kind: str, heads: Path) -> None:
    check(check_architecture(kind, heads / kind))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_variants_of_common_classes_extract_and_are_causal(name: str, heads: Path) -> None:
    kind, fields = VARIANTS[name]
    verdict = check_architecture(kind, heads / name, **fields)
    check(verdict)
    assert verdict.causal


@pytest.mark.filterwarnings("ignore")
def test_saved_heads_need_neither_torch_nor_transformers(heads: Path) -> None:
    # A norm and a softcap by formula, and two programs; with them those of the tests before.
    for kind in ("llama", "gemma2", "bert", "deepseek_v4"):
        if kind in KINDS and not (heads / kind).exists():
            check(check_architecture(kind, heads / kind))
    assert len(list(heads.iterdir())) >= 3
    command = [sys.executable, "-c", OFFLINE, str(heads), str(TOLERANCE)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("kind", ["bert", "roberta", "cpmant", "xlnet"])
@pytest.mark.filterwarnings("ignore")
def test_models_that_see_later_tokens_are_marked(kind: str, tmp_path: Path) -> None:
    assert not check_architecture(kind, tmp_path).causal


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_class_extracts_or_says_why_not(kind: str, tmp_path: Path) -> None:
    verdict = check_architecture(kind, tmp_path)
    if kind in NOT_BUILT:
        assert verdict.status == "not built"
    else:
        check(verdict)


@pytest.mark.skipif(transformers.__version__ < "5", reason="counted for transformers 5")
def test_all_classes_of_transformers_are_listed() -> None:
    assert set(KINDS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(KINDS) - len(NOT_BUILT) - len(REFUSED) >= 183


@pytest.mark.skipif(transformers.__version__ < "5", reason="written with transformers 5")
def test_the_page_of_the_docs_says_what_the_tests_say() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| (\w*) \| (.*)", PAGE.read_text(), re.MULTILINE)
    found = {kind: rest for kind, _, rest in rows if kind != "type"}
    assert set(found) == set(KINDS)
    assert {kind for kind, rest in found.items() if rest.startswith("**refused")} == set(REFUSED)
    assert {kind for kind, rest in found.items() if rest.startswith("**not built")} == NOT_BUILT
    assert not [kind for kind, rest in found.items() if rest.startswith("**wrong")]


@pytest.mark.parametrize(
    ("kind", "fields"), [("bert", {"is_decoder": True}), ("deepseek_v4", {}), ("xlnet", {})]
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_models_go_through_the_whole_extraction(
    kind: str, fields: dict, texts_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model: Any = build_architecture(kind, vocab_size=models.VOCAB, **fields)
    model.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    cache = residua.extract(
        str(folder),
        str(texts_file),
        root=tmp_path / "root",
        context=64,
        max_tokens=600,
        dtype="float32",
    )
    start, length = int(cache.sequence_start[2]), int(cache.sequence_length[2])
    ids = torch.from_numpy(cache.tokens[start : start + length].astype(np.int64))[None]
    with torch.inference_mode():
        want = run_model(model, ids).logits[0].numpy()
    got = cache.logits()[start : start + length].compute()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()  # batches differ: rounding
    assert cache.manifest.extra["causal"] == (kind != "xlnet")


@pytest.mark.filterwarnings("ignore")
def test_a_tail_that_masks_pad_tokens_is_refused_only_for_texts_that_hold_them() -> None:
    model: Any = build_architecture("xlm")
    assert check_model(model, random_stream(), "float32", "auto").head.kind == "explicit"
    ids = np.array(random_stream().ids[:])
    ids[::7] = model.config.pad_token_id
    with pytest.raises(ModelError, match="not a function of the last block's output alone"):
        check_model(model, from_sequences(np.split(ids, 6)), "float32", "auto")
