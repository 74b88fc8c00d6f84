"""A model with only a SentencePiece vocabulary is converted, or missing libraries are named."""

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from residua.cache.errors import ModelError
from residua.cache.model import tokenizer as tokenizer_module
from residua.cache.model.tokenizer import load_tokenizer

from ...support.models import texts

TEXTS = ["the cat sat", "a  b\n\tc  ", "naïve 东京 \U0001f600", "don't </s>"]
"""No text begins with a space: there transformers adds no further one, and SentencePiece does."""


def write_settings(folder: Path, **settings: Any) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    value = {"tokenizer_class": "LlamaTokenizer", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    "missing", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]]
)
def test_missing_libraries_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    def version_without(name: str) -> str:
        if name in missing:
            raise PackageNotFoundError(name)
        return "1"

    write_settings(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\xff\xff")
    monkeypatch.setattr(tokenizer_module, "version", version_without)
    listed = re.escape(f"({', '.join(missing)}): pip install 'residua[sentencepiece]' brings")
    message = f"only a SentencePiece tokenizer, .* {listed} them; or copy"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


def test_a_file_of_tiktoken_is_none_of_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_is_installed", lambda _: False)
    write_settings(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_vocabulary_of_sentencepiece_gives_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adds_bos: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "model"
    folder.mkdir()
    write_settings(folder, add_bos_token=adds_bos)
    # The settings of Llama's vocabulary: text is not normalised, unknown letters are bytes.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(200)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for text in TEXTS[:3]:
        ids = own.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.encode(text).ids == ([own.bos_id()] if adds_bos else []) + ids
    assert tokenizer.encode(TEXTS[3]).ids[-1] == own.eos_id()
