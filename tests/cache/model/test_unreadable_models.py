"""Folders that are no model to extract from: one message that says what is there and what to do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

from residua.cache.documents.document_loading import load_documents
from residua.cache.errors import DataError, ModelError
from residua.cache.model.model_loading import load_model
from residua.cache.model.source import ModelSource
from residua.cache.model.tokenizer import convert_tokenizer, load_tokenizer
from residua.cache.model.transformers_guard import guard_transformers


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_json(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}))


def test_a_folder_without_a_vocabulary_has_no_tokenizer(model: Path) -> None:
    for keep_settings in (True, False):
        (model / "tokenizer.json").unlink(missing_ok=True)
        if not keep_settings:
            for path in model.glob("*token*.json"):
                path.unlink()
        change_json(model / "config.json", model_type="gpt2")
        with pytest.raises(ModelError, match="no file holds a vocabulary"):
            load_tokenizer(model)


def test_a_tokenizer_that_finds_no_token_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: empty)
    with pytest.raises(ModelError, match="vocabulary is empty"):
        convert_tokenizer(model)


def test_code_of_a_tokenizer_needs_the_option_by_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.json").unlink()
    (model / "mine.py").write_text(f"open({str(model / 'RAN')!r}, 'w')\n")
    names = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    change_json(model / "tokenizer_config.json", auto_map=names, tokenizer_class="Mine")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_tokenizer(model)
    assert not (model / "RAN").exists()


def test_transformers_asks_nothing_where_a_call_forgets_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    with guard_transformers(), pytest.raises(ValueError, match="custom code"):
        dynamic_module_utils.resolve_trust_remote_code(None, "a/model", False, True)
    assert questions == []
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


def test_an_adapter_is_named_with_and_without_a_configuration(model: Path) -> None:
    change_json(model / "adapter_config.json", base_model_name_or_path="a/model")
    with pytest.raises(ModelError, match="adapter of another model"):
        _ = ModelSource.locate(str(model)).identity
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match="adapter of another model"):
        ModelSource.locate(str(model))


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "BartModel", None])
def test_an_encoder_decoder_is_named_as_such(model: Path, architecture: str | None) -> None:
    architectures = None if architecture is None else [architecture]
    change_json(model / "config.json", is_encoder_decoder=True, architectures=architectures)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        load_model(ModelSource.locate(str(model)))


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/nowhere/else")
    with pytest.raises(ModelError, match="link to /nowhere/else"):
        ModelSource.locate(str(link))
    with pytest.raises(DataError, match="link to /nowhere/else"):
        load_documents(str(link))


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv", "texts.parquet"])
def test_a_git_lfs_pointer_is_no_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DataError, match="git lfs pull"):
        load_documents(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers = 1,000,000,000, .* tensors; give"),
        ({"vocab_size": 10**9}, "describes a model of .* values, its weights hold"),
        ({"hidden_size": 2**20}, "describes a model of .* values, its weights hold"),
        ({"intermediate_size": 10**9}, "describes a model of .* values, its weights hold"),
    ],
)
def test_a_configuration_of_another_size_costs_neither_time_nor_memory(
    model: Path, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def load_nothing(*args: Any, **options: Any) -> None:
        raise AssertionError("transformers builds the model")

    change_json(model / "config.json", **values)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_nothing)
    with pytest.raises(ModelError, match=f"config.json {message}"):
        load_model(ModelSource.locate(str(model)))


@pytest.mark.parametrize(
    "values", [{"layer_norm_eps": "x"}, {"dtype": "nope"}, {"eos_token_id": "x"}]
)
def test_a_wrong_configuration_is_not_said_of_the_tokenizer(
    model: Path, values: dict[str, Any]
) -> None:
    change_json(model / "config.json", **values)
    with pytest.raises(ModelError, match=r"config\.json cannot be used: .*; expected the config"):
        convert_tokenizer(model)


def test_pipes_and_devices_are_no_texts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        with pytest.raises(DataError, match="no regular file"):
            load_documents(str(path))
