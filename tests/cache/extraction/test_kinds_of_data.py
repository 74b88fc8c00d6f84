"""Token ids, conversations, several files and standard input, from the request to a cache."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.errors import DataError, ModelError, UsageError
from residua.cache.extraction import stream_memo
from residua.cache.extraction.answer import answer_request, estimate_request, find_match
from residua.cache.extraction.distributed import answer_on_cluster
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.extraction.resolve import read_stream, summarize_stream, wanted_cache
from residua.cache.extraction.stream_memo import data_stamps, read_stream_memo
from residua.cache.model import weight_digests
from residua.cache.model.source import ModelSource
from residua.cache.store.local_origin import public_name
from residua.cache.store.verification import verify
from residua.cache.tokens.token_stream import TokenStream

from ...support.models import VOCAB, save_model, texts

OPTIONS: dict[str, Any] = {"context": 40, "part_positions": 512, "batch_tokens": 200}
TEMPLATE = (
    "{% for turn in messages %}<|endoftext|>{{ turn['role'] }}: {{ turn['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|endoftext|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds a token before texts and has a chat template."""
    folder = save_model(tmp_path_factory.mktemp("models") / "chat", bos=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def request_for(model: Path, data: Path | str, root: Path, **options: Any) -> ExtractionRequest:
    return ExtractionRequest(str(model), str(data), root, **{**OPTIONS, **options})


def stream_for(model: Path, data: Path | str, root: Path, **options: Any) -> TokenStream:
    request = request_for(model, data, root, **options)
    return read_stream(request, ModelSource.locate(request.model), None)


def documents_of(stream: TokenStream) -> dict[int, list[int]]:
    """Document number -> its tokens, of a stream with one sequence per document."""
    numbers = enumerate(stream.row_ids.tolist())
    return {row: stream.sequence(number).tolist() for number, row in numbers}


ID_ROWS = [
    {
        "input_ids": np.random.default_rng(n).integers(0, VOCAB, 5 + n % 9).tolist(),
        "attention_mask": [0] * (n % 3) + [1] * (5 + n % 9 - n % 3 - n % 2) + [0] * (n % 2),
        "kind": ["one", "two"][n % 2],
        "positions": [0, -1],
    }
    for n in range(30)
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_rows_of_token_ids_are_sequences_without_their_padding(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    data = write_rows(tmp_path / name, ID_ROWS)
    stream = stream_for(model_folder, data, tmp_path, pack=False)
    want = {
        number: [t for t, m in zip(row["input_ids"], row["attention_mask"], strict=True) if m]
        for number, row in enumerate(ID_ROWS)
    }
    assert documents_of(stream) == want
    assert set(stream.sequence_arrays) == {"sequences/labels/kind"}
    assert stream.reading.text_column == "input_ids"
    # Positions of a row count its tokens without padding.
    ends = stream_for(model_folder, data, tmp_path, pack=False, positions="explicit")
    assert ends.runs is not None
    firsts = ends.runs.first.tolist()
    assert firsts == [n for length in ends.lengths.tolist() for n in (0, length - 1)]
    packed = stream_for(model_folder, data, tmp_path)
    assert sorted(packed.ids[:].tolist()) == sorted(t for ids in want.values() for t in ids)


def test_rows_of_token_ids_may_lack_a_mask_and_have_another_name(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": "a text", "tokens": row["input_ids"]} for row in ID_ROWS]
    for name in ("a.jsonl", "a.parquet", "saved"):
        data = write_rows(tmp_path / name, rows)
        stream = stream_for(model_folder, data, tmp_path, pack=False, text_column="tokens")
        assert documents_of(stream) == {n: row["tokens"] for n, row in enumerate(rows)}
        assert stream_for(model_folder, data, tmp_path).reading.text_column == "text"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, VOCAB]}, f"'input_ids' holds token {VOCAB}, but the model's vocabulary"),
        ({"input_ids": [1, -1]}, "line 31: the column 'input_ids' holds -1, which is no token id"),
        ({"input_ids": [1, 2**40]}, f"line 31: .* holds {2**40}, which is no token id"),
        ({"input_ids": [1, "a"]}, "line 31: the column 'input_ids' must hold lists of whole"),
        ({"input_ids": [1, 1.5]}, "no obvious text column|must hold lists of whole numbers"),
        ({"input_ids": 7}, "line 31: the column 'input_ids' must hold lists of whole numbers"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "line 31: .* a list of 2 zeros and ones"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "line 31: .* a list of 2 zeros and ones"),
        (
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "line 31: .*'attention_mask' has zeros between ones",
        ),
    ],
)
def test_a_wrong_row_of_token_ids_is_named(
    model_folder: Path, tmp_path: Path, row: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residua.cache.documents.row_files.SAMPLE_ROWS", 20)
    data = write_rows(tmp_path / "a.jsonl", [*ID_ROWS, row])
    with pytest.raises(DataError, match=message):
        stream_for(model_folder, data, tmp_path)


def test_options_that_need_a_text_are_refused_for_token_ids(
    model_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{**row, "answer": "a"} for row in ID_ROWS])
    with pytest.raises(UsageError, match="positions answer looks for the answer in a text"):
        stream_for(model_folder, data, tmp_path, pack=False, positions="answer")
    with pytest.raises(UsageError, match="a generation prompt is for conversations"):
        stream_for(model_folder, data, tmp_path, generation_prompt=True)
    with pytest.raises(UsageError, match="rows of token ids need a cache of format 2"):
        stream_for(model_folder, data, tmp_path, format=1)


def test_a_cache_of_token_ids_holds_the_activations_of_the_model(
    model_folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    data = write_rows(tmp_path / "a.jsonl", ID_ROWS)
    cache = residua.extract(model_folder, data, root=tmp_path / "root", pack=False, dtype="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    for number in range(3):
        start, length = cache.sequence_start[number], cache.sequence_length[number]
        ids = torch.tensor(cache.tokens[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[1][0].numpy()
        rows = cache.residual_array(1)[start : start + length]
        np.testing.assert_allclose(rows, states, atol=1e-5)
    assert verify(cache.path).ok
    again = residua.extract(model_folder, data, root=tmp_path / "root", pack=False, dtype="float32")
    assert again.id == cache.id


TURNS = [
    [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text}]
    for text in texts(12, seed=4)
]


def rendered(turns: list[dict[str, str]], prompt: bool = False) -> str:
    text = "".join(f"<|endoftext|>{turn['role']}: {turn['content']}\n" for turn in turns)
    return text + ("<|endoftext|>assistant:" if prompt else "")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_are_rendered_with_the_models_template(
    chat_model: Path, tmp_path: Path, name: str, prompt: bool
) -> None:
    rows = [{"messages": turns, "grade": n} for n, turns in enumerate(TURNS)]
    data = write_rows(tmp_path / name, rows)
    stream = stream_for(
        chat_model, data, tmp_path, pack=False, context=128, generation_prompt=prompt
    )
    encode = ModelSource.locate(str(chat_model)).tokenizer.encode
    assert documents_of(stream) == {
        n: encode(rendered(turns, prompt), add_special_tokens=False).ids[:128]
        for n, turns in enumerate(TURNS)
    }
    assert [note for note in stream.reading.notes if "chat template" in note] == [
        "the conversations of the column 'messages' are rendered with the model's chat template, "
        f"{'with' if prompt else 'without'} a generation prompt (--generation-prompt)"
    ]
    assert stream.sequence_arrays["sequences/labels/grade"].tolist() == stream.row_ids.tolist()


def test_speakers_of_other_data_sets_have_roles(chat_model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a cat"}, {"from": "gpt", "value": "sat"}]
    data = write_rows(tmp_path / "a.jsonl", [{"conversations": turns}] * 3)
    stream = stream_for(chat_model, data, tmp_path, pack=False)
    encode = ModelSource.locate(str(chat_model)).tokenizer.encode
    same = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]
    assert stream.sequence(0).tolist() == encode(rendered(same), add_special_tokens=False).ids


def test_the_template_is_part_of_the_identity(
    chat_model: Path, model_folder: Path, tmp_path: Path
) -> None:
    import hashlib

    data = write_rows(tmp_path / "a.jsonl", [{"messages": turns} for turns in TURNS])
    cache = residua.extract(chat_model, data, root=tmp_path / "root")
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert cache.manifest.tokens.chat_template == digest
    request = request_for(chat_model, data, tmp_path / "root", generation_prompt=True)
    source = ModelSource.locate(request.model)
    summary = summarize_stream(request, source, read_stream(request, source, None))
    wanted = wanted_cache(request, source, summary)
    assert wanted.tokens.chat_template == f"{digest}+generation_prompt"
    assert find_match(request).answer == "miss"
    assert residua.extract(chat_model, data, root=tmp_path / "root").id == cache.id
    # Of a model without a template, conversations are no texts.
    with pytest.raises(DataError, match="no chat template is applied, as the model has none"):
        stream_for(model_folder, data, tmp_path)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "robot", "value": "x"}], "the speaker 'robot' is unknown"),
        (["a text"], "a conversation must be a list of turns"),
        ("a text", "a conversation must be a list of turns"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named(
    chat_model: Path, tmp_path: Path, turns: Any, message: str
) -> None:
    rows = [{"messages": turns} for turns in TURNS]
    data = write_rows(tmp_path / "a.jsonl", [*rows, {"messages": turns}])
    with pytest.raises(DataError, match=f"line 13: .*{message}"):
        stream_for(chat_model, data, tmp_path)


def test_a_template_that_fails_is_an_error_of_the_model(model_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "model")
    data = write_rows(tmp_path / "a.jsonl", [{"messages": turns} for turns in TURNS])
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match="line 1: the model's chat template refuses .*no system"):
        stream_for(folder, data, tmp_path)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the chat template of .* cannot be read"):
        stream_for(folder, data, tmp_path)


def test_text_beside_conversations_is_read_as_before(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": turns, "text": "a text"} for turns in TURNS]
    data = write_rows(tmp_path / "a.jsonl", rows)
    assert stream_for(chat_model, data, tmp_path).reading.text_column == "text"
    stream = stream_for(chat_model, data, tmp_path, text_column="messages")
    assert stream.chat_template is not None


def test_the_policy_of_special_tokens_is_part_of_the_identity(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    cache = residua.extract(model_folder, texts_file, root=root, bos="context", **OPTIONS)
    assert cache.manifest.tokens.bos == "context"
    firsts = cache.tokens[cache.sequence_start.astype(np.int64)]
    assert set(firsts.tolist()) == {0}
    assert find_match(request_for(model_folder, texts_file, root)).answer == "miss"
    assert find_match(request_for(model_folder, texts_file, root, bos="context")).answer == "hit"
    with pytest.raises(UsageError, match="caches of format 1 have no bos 'none'"):
        request_for(model_folder, texts_file, root, bos="none", format=1)
    with pytest.raises(UsageError, match="bos 'often' is unknown"):
        request_for(model_folder, texts_file, root, bos="often")
    with pytest.raises(UsageError, match="data_format 'html' is unknown"):
        request_for(model_folder, texts_file, root, data_format="html")


def write_shards(folder: Path, file: Path, count: int = 5) -> Path:
    """The lines of `file` in several files of `folder`."""
    lines = file.read_text().splitlines(keepends=True)
    folder.mkdir()
    size = -(-len(lines) // count)
    for number in range(count):
        shard = lines[number * size : (number + 1) * size]
        (folder / f"{number}.jsonl").write_text("".join(shard))
    return folder


def test_shards_and_standard_input_give_the_cache_of_one_file(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    cache = residua.extract(model_folder, texts_file, root=root, **OPTIONS)
    shards = write_shards(tmp_path / "shards", texts_file)
    for data in (shards, f"{shards}/*.jsonl"):
        extraction = answer_request(request_for(model_folder, data, root))
        assert (extraction.status, extraction.cache.id) == ("hit", cache.id)
    stdin = io.TextIOWrapper(io.BytesIO(texts_file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    extraction = answer_request(request_for(model_folder, "-", root))
    assert (extraction.status, extraction.cache.id) == ("hit", cache.id)
    # A new cache, made from standard input, which is read once.
    stdin = io.TextIOWrapper(io.BytesIO(texts_file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    made = answer_request(request_for(model_folder, "-", tmp_path / "other"))
    assert (made.status, made.cache.id) == ("extracted", cache.id)
    assert made.cache.manifest.data_name == "standard input"
    with pytest.raises(UsageError, match="workers of a scheduler cannot read standard input"):
        answer_on_cluster(None, request_for(model_folder, "-", root))  # pyright: ignore


def test_a_stream_of_shards_is_remembered_until_a_file_changes(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(stream_memo, "MIN_BYTES", 0)
    monkeypatch.setattr(weight_digests, "SETTLED_SECONDS", 0)
    shards = write_shards(tmp_path / "shards", texts_file)
    source = ModelSource.locate(str(model_folder))
    for data in (str(shards), f"{shards}/*.jsonl"):
        request = request_for(model_folder, data, tmp_path / "root")
        assert read_stream_memo(request, source) is None
        find_match(request)
        assert read_stream_memo(request, source) is not None
        for options in ({"bos": "none"}, {"data_format": "jsonl"}, {"generation_prompt": True}):
            other = request_for(model_folder, data, tmp_path / "root", **options)
            assert read_stream_memo(other, source) is None
        (shards / "9.jsonl").write_text('{"text": "one more"}\n')
        assert read_stream_memo(request, source) is None
        (shards / "9.jsonl").unlink()
    assert data_stamps("-") is None
    assert data_stamps(f"{tmp_path}/*.nothing") is None


def test_only_the_last_part_of_a_pattern_is_published(tmp_path: Path) -> None:
    assert public_name(f"{tmp_path}/secret/*.jsonl") == "*.jsonl"
    assert public_name("-") == "standard input"


def test_a_dry_run_shows_what_the_model_will_read(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    request = request_for(model_folder, texts_file, tmp_path / "root")
    estimate = estimate_request(request)
    stream = stream_for(model_folder, texts_file, tmp_path / "root")
    assert sum(estimate.splits.values()) == len(stream.lengths) == estimate.sequences
    numbers = [beginning.sequence for beginning in estimate.beginnings]
    assert numbers == [0, (len(stream.lengths) - 1) // 2, len(stream.lengths) - 1]
    for beginning in estimate.beginnings:
        ids = stream.sequence(beginning.sequence).tolist()
        assert list(beginning.ids) == ids[:24]
        assert beginning.length == len(ids)
        assert beginning.document == stream.row_ids[beginning.sequence]
