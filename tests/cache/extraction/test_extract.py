"""What extraction keeps is what the model computed, however it was cut, stopped or repeated."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import residua
from residua.cache.errors import (
    DataError,
    HeadMismatchError,
    IncompleteError,
    ModelError,
    NoSpaceError,
    UsageError,
)
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.forward import part_runner as runner
from residua.cache.model.blocks import DecoderBlocks
from residua.cache.model.transformers_guard import guard_transformers
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import save_model, texts


def load(folder: Path) -> torch.nn.Module:
    with guard_transformers():
        return AutoModelForCausalLM.from_pretrained(folder)


def by_transformers(
    model: Any, cache: ActivationCache, number: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Layers 0..L and logits of one sequence alone, by transformers and a hook on its norm."""
    rows = cache.positions_of(np.array([number]))
    ids = torch.from_numpy(cache.tokens.take(rows).astype(np.int64))[None]
    last: list[torch.Tensor] = []
    norm = model.gpt_neox.final_layer_norm
    handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    try:
        with torch.inference_mode():
            out = model(input_ids=ids, output_hidden_states=True)
    finally:
        handle.remove()
    # The last of the reported states is behind the norm; layer L is before it.
    layers = [*out.hidden_states[:-1], last[0]]
    return [layer[0].numpy() for layer in layers], out.logits[0].numpy()


ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of a value that is rounded to the nearest of a dtype."""
LOGITS_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""Largest error of logits, relative to the largest logit, where layer L is rounded so."""


@pytest.mark.parametrize(
    ("pack", "dtype"),
    [(True, "float32"), (False, "float32"), (False, "float16"), (True, "bfloat16")],
)
def test_every_row_is_what_the_model_gives_for_its_sequence_alone(
    model_folder: Path, texts_file: Path, tmp_path: Path, pack: bool, dtype: str
) -> None:
    cache = residua.extract(
        str(model_folder),
        str(texts_file),
        root=tmp_path,
        context=48,
        pack=pack,
        dtype=dtype,
        part_positions=256,
        batch_tokens=300,
    )
    assert cache.n_parts > 2
    assert cache.layers == (0, 1, 2, 3)
    model, seen = load(model_folder), 0
    for number in range(len(cache.sequence_length)):
        rows = cache.positions_of(np.array([number]))
        layers, logits = by_transformers(model, cache, number)
        assert len(layers) == len(cache.layers)
        for layer, expected in enumerate(layers):
            got = cache.residual_array(layer).take(rows)
            # Float32 sums of another batch differ in their last bits.
            error = np.abs(got - expected) - ROUNDING[dtype] * np.abs(expected)
            assert error.max() <= 1e-5 * np.abs(expected).max(), (number, layer)
        got = cache.logits()[rows[0] : rows[-1] + 1].compute()
        assert np.abs(got - logits).max() <= LOGITS_ERROR[dtype] * np.abs(logits).max()
        seen += len(rows)
    assert seen == cache.positions


@pytest.mark.filterwarnings("ignore")
def test_padding_is_hidden_from_a_model_that_sees_later_tokens(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of padded batches of mixed lengths, against its sequence alone."""
    from ...support import models
    from ...support.architectures import build_architecture

    model: Any = build_architecture("bert", vocab_size=models.VOCAB)
    assert not model.config.is_decoder
    model.save_pretrained(tmp_path / "model")
    models.build_tokenizer().save_pretrained(tmp_path / "model")
    padded: list[int] = []
    residuals = DecoderBlocks.residuals

    def counting(self: DecoderBlocks, ids: Any, mask: Any = None) -> Any:
        padded.append(0 if mask is None else int((mask == 0).sum()))
        return residuals(self, ids, mask)

    monkeypatch.setattr(DecoderBlocks, "residuals", counting)
    cache = residua.extract(
        str(tmp_path / "model"),
        str(texts_file),
        root=tmp_path / "root",
        context=64,
        pack=False,
        dtype="float32",
        batch_tokens=600,
        part_positions=1024,
        max_tokens=2500,
    )
    monkeypatch.undo()
    assert cache.manifest.extra["causal"] is False
    assert cache.manifest.extra["pad"] is True
    lengths = cache.sequence_length
    assert len(set(lengths.tolist())) > 10
    assert sum(number > 0 for number in padded) > 5
    changed = 0.0
    for number, length in enumerate(lengths.tolist()):
        rows = cache.positions_of(np.array([number]))
        ids = torch.from_numpy(cache.tokens.take(rows).astype(np.int64))[None]
        with torch.inference_mode():
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states
            longer = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1)
            seen = model(input_ids=longer, output_hidden_states=True).hidden_states
        assert len(layers) == len(cache.layers)
        for layer, expected in enumerate(layers):
            got = torch.from_numpy(cache.residual_array(layer).take(rows))
            assert float((got - expected[0]).abs().max()) <= 1e-5 * float(expected.abs().max())
        changed = max(changed, float((seen[-1][0, :length] - layers[-1][0]).abs().max()))
    assert changed > 1e-2  # padding that is seen would change the rows


def test_the_same_request_is_a_hit_and_writes_nothing(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    request = ExtractionRequest(str(model_folder), str(texts_file), tmp_path, context=64)
    first = answer_request(request)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    second = answer_request(request)
    assert (first.status, second.status) == ("extracted", "hit")
    assert second.written == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_identity_follows_weights_and_tokens_not_places(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = {"root": tmp_path / "a", "context": 64, "max_tokens": 1000}
    one = residua.extract(str(model_folder), str(texts_file), **options)
    moved = tmp_path / "elsewhere"
    shutil.copytree(model_folder, moved)
    assert residua.extract(str(moved), str(texts_file), **options).path == one.path
    other = save_model(tmp_path / "tuned", seed=5)
    assert residua.extract(str(other), str(texts_file), **options).id != one.id
    assert (
        residua.extract(str(model_folder), str(texts_file), **{**options, "seed": 1}).id != one.id
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Make the model fail after some batches, as a killed process would."""
    left = [batches]
    forward = runner.PartRunner._residuals

    def failing(self: runner.PartRunner, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(runner.PartRunner, "_residuals", failing)


@pytest.mark.parametrize("pack", [True, False])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pack: bool,
) -> None:
    def request(name: str) -> ExtractionRequest:
        return ExtractionRequest(
            str(model_folder),
            str(texts_file),
            tmp_path / name,
            context=40,
            pack=pack,
            part_positions=512,
            batch_tokens=200,
        )

    whole = answer_request(request("whole")).cache
    for batches in (2, 7, 12):
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            with pytest.raises(KeyboardInterrupt):
                answer_request(request("broken"))
    part = ActivationCache(tmp_path / "broken" / whole.id)
    assert not part.complete
    with pytest.raises(IncompleteError, match="run the same `residua extract` again"):
        part.residual_array(0)
    extraction = answer_request(request("broken"))
    assert extraction.status == "resumed"
    assert 0 < extraction.written < whole.positions
    for file in sorted((whole.path / "arrays.zarr").rglob("*")):
        if file.is_file():
            twin = extraction.cache.path / file.relative_to(whole.path)
            assert twin.read_bytes() == file.read_bytes(), file
    assert residua.verify(extraction.cache.path).ok


def test_resuming_with_other_weights_is_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.checks.model_checks import recheck_model

    cache = residua.extract(str(model_folder), str(texts_file), root=tmp_path, max_tokens=500)
    other = load(save_model(tmp_path / "other", seed=7)).eval()
    with pytest.raises(HeadMismatchError):
        recheck_model(other, cache)


def test_splits_and_tokens_survive(tiny_cache: ActivationCache, texts_file: Path) -> None:
    splits = [set(tiny_cache.sequences(name)) for name in ("train", "validation", "test")]
    assert all(splits)
    assert sum(map(len, splits)) == len(tiny_cache.sequence_length)
    text = tiny_cache.tokenizer().decode(list(tiny_cache.tokens[:200]), skip_special_tokens=True)
    words = set(" ".join(texts(120)).split())
    assert len(words & set(text.split())) > 10


def test_overflow_in_float16_is_refused(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    from ...support.synthetic import make_cache, random_head

    rows = np.ones((64, 4), np.float32)
    rows[3, 2] = 7e4
    with pytest.raises(UsageError, match="float16 cannot hold"):
        make_cache(tmp_path, [rows, rows], [64], random_head(4, 9), dtype="float16")


def test_a_full_disk_is_refused_before_anything_is_written(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr("residua.cache.extraction.plan.shutil.disk_usage", lambda _: usage)
    with pytest.raises(NoSpaceError, match="needs .* has 0.00 GB free"):
        residua.extract(str(model_folder), str(texts_file), root=tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        ("nowhere/at/all", "{data}", {}, ModelError, "is not a model folder"),
        ("{data}", "{data}", {}, ModelError, "is not a model folder"),
        ("{model}", "missing.jsonl", {}, DataError, "does not exist"),
        ("{model}", "{data}", {"context": 4096}, UsageError, "longer than this model's 128"),
        ("{model}", "{data}", {"context": 0}, UsageError, "must be at least 1"),
        ("{model}", "{data}", {"dtype": "int8"}, UsageError, "choose one of auto, float16"),
        ("{model}", "{data}", {"text_column": "body"}, DataError, "text columns are: text"),
        ("{model}", "{data}", {"max_tokens": 5}, DataError, "less than one sequence"),
        ("{model}", "{data}", {"device": "cuda:9"}, ModelError, "cannot be used"),
    ],
)
def test_bad_requests_say_what_is_wrong_and_leave_nothing(
    model: str,
    data: str,
    options: dict,
    error: type[Exception],
    message: str,
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    names = {"model": model_folder, "data": texts_file}
    with pytest.raises(error, match=message):
        residua.extract(
            model.format(**names), data.format(**names), root=tmp_path / "root", **options
        )
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_tokenizer_of_another_model_is_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(ModelError, match="do not belong to this model"):
        residua.extract(str(folder), str(texts_file), root=tmp_path / "root")


def test_pickled_weights_are_not_read(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        residua.extract(str(folder), str(texts_file), root=tmp_path / "root")


def test_rows_longer_than_the_context_are_counted(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    import tokenizers

    from residua.cache.files.json_files import read_json

    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    rows = [json.loads(line)["text"] for line in texts_file.read_text().splitlines()]
    extra = [max(0, len(tokenizer.encode(row).ids) - 32) for row in rows]
    expected = {"sequences": sum(n > 0 for n in extra), "tokens": sum(extra)}
    assert expected["sequences"] > 3
    part = tmp_path / "part.jsonl"
    part.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:50]))
    options = {"root": tmp_path, "context": 32, "pack": False}
    first = answer_request(ExtractionRequest(str(model_folder), str(part), **options))
    found = {"sequences": sum(n > 0 for n in extra[:50]), "tokens": sum(extra[:50])}
    assert first.cut == read_json(first.cache.path / "provenance.json")["cut"] == found
    extraction = answer_request(ExtractionRequest(str(model_folder), str(texts_file), **options))
    assert extraction.status == "extended"
    again = answer_request(ExtractionRequest(str(model_folder), str(texts_file), **options))
    for one in (extraction, again):
        assert one.to_dict()["cut"] == expected
    assert read_json(extraction.cache.path / "provenance.json")["cut"] == expected
    packed = answer_request(
        ExtractionRequest(str(model_folder), str(texts_file), root=tmp_path, context=32)
    )
    assert packed.cut == {"sequences": 0, "tokens": 0}


def test_people_are_told_what_was_cut_off(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from residua.cli import main

    args = [
        "extract",
        str(model_folder),
        str(texts_file),
        "--context",
        "32",
        "--root",
        str(tmp_path),
    ]
    for more in (["--dry-run", "--no-pack"], ["--no-pack"]):
        said = CliRunner().invoke(main, args + more).stdout
        assert "documents are longer than the context" in said
    assert "longer than the context" not in CliRunner().invoke(main, args).stdout
