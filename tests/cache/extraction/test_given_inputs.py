"""Models and texts that are given in Python have the caches of the same files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import residua
from residua.cache.errors import DataError, MismatchError, ModelError, UsageError
from residua.cache.model.transformers_guard import guard_transformers

from ...support.models import build_model, build_tokenizer, save_model, texts

SMALL: dict[str, Any] = {"context": 64, "part_positions": 1024, "progress": None}


def load(folder: Path, **options: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    with guard_transformers():
        return auto.from_pretrained(folder, **options)


def tokenizer_of(folder: Path) -> Any:
    auto: Any = AutoTokenizer
    with guard_transformers():
        return auto.from_pretrained(folder)


def read_all(cache: residua.ActivationCache) -> list[np.ndarray]:
    return [cache.residual_array(layer)[:] for layer in cache.layers]


@pytest.fixture(params=["list", "rows", "generator", "frame", "dataset", "splits"])
def given_texts(request: pytest.FixtureRequest) -> Any:
    """The texts of `texts_file` in each form that `extract` takes."""
    rows = [{"text": text} for text in texts(120)]
    forms = {
        "list": lambda: texts(120),
        "rows": lambda: rows,
        "generator": lambda: (row for row in rows),
        "frame": lambda: pd.DataFrame(rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "splits": lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}),
    }
    return forms[request.param]()


def test_texts_in_python_find_the_cache_of_the_file(
    tiny_cache: residua.ActivationCache, model_folder: Path, given_texts: Any
) -> None:
    cache = residua.extract(model_folder, given_texts, root=tiny_cache.path.parent, **SMALL)
    assert cache.id == tiny_cache.id


def test_a_new_cache_names_the_texts_and_leaves_no_file(model_folder: Path, tmp_path: Path) -> None:
    cache = residua.extract(model_folder, texts(30), root=tmp_path, **SMALL)
    assert cache.manifest.data_name == "30 texts given in Python"
    assert [path.name for path in tmp_path.iterdir()] == [cache.id]
    rows: Iterator[dict[str, Any]] = (
        {"text": text, "label": n} for n, text in enumerate(texts(30))
    )
    again = residua.extract(model_folder, rows, root=tmp_path, **SMALL)
    assert again.id == cache.id


def test_columns_beside_the_text_are_labels_and_positions(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": text, "label": np.int64(n), "score": np.float32(n / 2), "word": "a"}
        for n, text in enumerate(texts(12))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({**row, "label": n, "score": n / 2}) + "\n" for n, row in enumerate(rows)
        )
    )
    options: Any = {**SMALL, "pack": False, "positions": "last", "text_column": "prompt"}
    of_file = residua.extract(model_folder, file, root=tmp_path / "a", **options)
    of_rows = residua.extract(model_folder, rows, root=tmp_path / "b", **options)
    assert of_rows.id == of_file.id
    for name in ("label", "score", "word"):
        array = f"sequences/label/{name}"
        assert of_rows.has(array) == of_file.has(array)
        if of_file.has(array):
            assert np.array_equal(of_rows.array(array)[:], of_file.array(array)[:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "texts cannot be a int"),
        (None, "texts cannot be a NoneType"),
        ({"text": ["a"]}, "texts cannot be a dict"),
        (b"text", "texts cannot be a bytes"),
        ([3], "row 0 of the texts is a int; expected a text or a dictionary"),
        (["a", ["b"]], "row 1 of the texts is a list"),
        ([{"text": b"\xff"}], "row 0 of the texts cannot be read: its bytes are no UTF-8"),
        ([], "0 texts given in Python has no rows"),
        ([{"a": "x y", "b": "z w"}], "2? ?.*no obvious text column|choose"),
        ([{"text": 7}], "1 rows given in Python"),
    ],
)
def test_what_holds_no_texts_is_refused(
    model_folder: Path, tmp_path: Path, data: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        residua.extract(model_folder, data, root=tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


def test_options_of_other_texts_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split is for data sets"):
        residua.extract(model_folder, texts(3), root=tmp_path, split="test", **SMALL)
    with pytest.raises(UsageError, match="separator is for"):
        residua.extract(model_folder, texts(3), root=tmp_path, separator=",", **SMALL)
    dataset: Any = datasets.DatasetDict({"a": datasets.Dataset.from_list([{"text": "x"}])})
    with pytest.raises(DataError, match="no split 'b'; it has a"):
        residua.extract(model_folder, dataset, root=tmp_path, split="b", **SMALL)


# Loaded models


def test_a_loaded_model_finds_the_cache_of_its_folder(
    tiny_cache: residua.ActivationCache, model_folder: Path, texts_file: Path
) -> None:
    model = load(model_folder)
    root = tiny_cache.path.parent
    cache = residua.extract(model, texts_file, root=root, **SMALL)
    assert cache.id == tiny_cache.id
    tokenizer = tokenizer_of(model_folder)
    cache = residua.extract(model, texts(120), tokenizer=tokenizer, root=root, **SMALL)
    assert cache.id == tiny_cache.id


def test_the_folder_finds_the_cache_of_its_loaded_model_and_repairs_it(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    model = load(model_folder)
    options: Any = {**SMALL, "max_tokens": 1024, "root": tmp_path}
    cache = residua.extract(model, texts_file, **options)
    assert residua.extract(model_folder, texts_file, **options).id == cache.id
    rows = read_all(cache)
    (shard,) = cache.path.glob("arrays.zarr/residual/1/c/0/0")
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert residua.repair(cache.path).ok  # its model lies in the folder
    assert all(map(np.array_equal, rows, read_all(residua.open(cache.path))))


def test_a_checkpoint_of_a_narrower_dtype_than_the_model_is_its_folder(
    texts_file: Path, tmp_path: Path
) -> None:
    """The configuration says float32, the files hold float16."""
    model: Any = build_model("gpt2", torch.float16)
    with guard_transformers():
        model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    options: Any = {**SMALL, "max_tokens": 512, "root": tmp_path / "root"}
    original = residua.extract(tmp_path / "model", texts_file, **options)
    assert original.manifest.capture.compute_dtype == "float32"
    loaded = load(tmp_path / "model", dtype="auto")
    assert residua.extract(loaded, texts_file, **options).id == original.id
    with torch.no_grad():
        next(iter(loaded.parameters()))[0, 0] += 1e-6  # what float16 does not hold
    assert residua.extract(loaded, texts_file, **options).id != original.id


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2"])
def test_a_changed_model_has_the_identity_of_the_folder_that_it_would_be_saved_to(
    kind: str, texts_file: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", kind)
    model = load(folder)
    with torch.no_grad():
        next(iter(model.parameters()))[0] += 1.0
    tokenizer = tokenizer_of(folder)
    options: Any = {**SMALL, "max_tokens": 1024, "root": tmp_path / "root"}
    original = residua.extract(folder, texts_file, **options)
    cache = residua.extract(model, texts_file, tokenizer=tokenizer, **options)
    assert cache.id != original.id
    assert not np.array_equal(read_all(cache)[-1], read_all(original)[-1])
    with guard_transformers():
        model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = residua.extract(tmp_path / "saved", texts_file, **options)
    assert saved.id == cache.id


def test_a_model_without_a_folder_needs_its_tokenizer_and_is_needed_for_repairs(
    texts_file: Path, tmp_path: Path
) -> None:
    model: Any = build_model("gpt_neox", seed=5)
    options: Any = {**SMALL, "max_tokens": 1024, "root": tmp_path / "root"}
    with pytest.raises(UsageError, match="give the model's tokenizer, too: tokenizer="):
        residua.extract(model, texts_file, **options)
    tokenizer = build_tokenizer()
    cache = residua.extract(model, texts_file, tokenizer=tokenizer, **options)
    assert cache.manifest.model_name == "GPTNeoXForCausalLM"
    raw = tokenizer.backend_tokenizer
    assert isinstance(raw, Tokenizer)
    rows = read_all(cache)

    # Damage of a shard and of the head.
    (shard,) = cache.path.glob("arrays.zarr/residual/1/c/0/0")
    shard.write_bytes(b"\0" * shard.stat().st_size)
    (cache.path / "head" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="from a loaded model .* give the model again"):
        residua.repair(cache.path)
    with pytest.raises(MismatchError, match="is not the model of this cache"):
        residua.repair(cache.path, build_model("gpt_neox", seed=6), tokenizer=tokenizer)
    assert residua.repair(cache.path, model, tokenizer=tokenizer).ok
    assert all(map(np.array_equal, rows, read_all(residua.open(cache.path))))
    assert residua.load_model_of(cache, model).model is model


def test_an_interrupted_extraction_of_a_loaded_model_goes_on(
    texts_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = build_model("gpt2", seed=5), build_tokenizer()
    options: Any = {"context": 64, "part_positions": 256, "root": tmp_path, "tokenizer": tokenizer}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "extract" and done >= 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        residua.extract(model, texts_file, progress=stop, **options)
    cache = residua.extract(model, texts_file, progress=None, **options)
    assert cache.complete
    twin = build_model("gpt2", seed=5)
    assert residua.extract(twin, texts_file, progress=None, **options).id == cache.id


def test_the_dtype_and_attention_of_a_loaded_model_are_in_its_identity(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options: Any = {**SMALL, "max_tokens": 512, "root": tmp_path}
    half = residua.extract(load(model_folder, dtype=torch.bfloat16), texts_file, **options)
    assert half.manifest.capture.compute_dtype == "bfloat16"
    eager_model = load(model_folder, attn_implementation="eager")
    eager = residua.extract(eager_model, texts_file, **options)
    assert eager.manifest.capture.attention == "eager"
    named = residua.extract(model_folder, texts_file, attention="eager", **options)
    assert named.id == eager.id
    with pytest.raises(UsageError, match="runs with attention 'eager', not 'sdpa'"):
        residua.extract(eager_model, texts_file, attention="sdpa", **options)


def test_a_model_whose_activations_its_tensors_do_not_decide_is_refused_or_told_apart(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options: Any = {**SMALL, "max_tokens": 512, "root": tmp_path}
    original = residua.extract(model_folder, texts_file, **options)
    with pytest.raises(ModelError, match=r"training mode.*call model.eval\(\) first"):
        residua.extract(load(model_folder).train(), texts_file, **options)
    hooked = load(model_folder)
    hooked.gpt_neox.layers[1].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ModelError, match=r"'gpt_neox.layers.1' of the loaded model has hooks"):
        residua.extract(hooked, texts_file, **options)
    patched = load(model_folder)
    patched.gpt_neox.layers[1].forward = patched.gpt_neox.layers[0].forward
    with pytest.raises(ModelError, match="has a forward method of its own"):
        residua.extract(patched, texts_file, **options)
    rebuilt = load(model_folder)
    rebuilt.gpt_neox.layers[1].mlp.act = torch.nn.ReLU().eval()  # no tensor has changed
    assert residua.extract(rebuilt, texts_file, **options).id != original.id


def test_what_is_no_model_is_refused(texts_file: Path, tmp_path: Path, model_folder: Path) -> None:
    options: Any = {**SMALL, "root": tmp_path}
    number: Any = 3
    with pytest.raises(UsageError, match="a model cannot be a int"):
        residua.extract(number, texts_file, **options)
    with pytest.raises(ModelError, match="a Linear is no model of transformers"):
        residua.extract(torch.nn.Linear(2, 2), texts_file, **options)
    with pytest.raises(UsageError, match="has its own: leave tokenizer out"):
        residua.extract(model_folder, texts_file, tokenizer=build_tokenizer(), **options)
    with pytest.raises(ModelError, match="is no fast tokenizer"):
        residua.extract(build_model("gpt2"), texts_file, tokenizer=object(), **options)
    with pytest.raises(UsageError, match="stays on the device where it is"):
        residua.extract(load(model_folder), texts_file, device="cpu", **options)
    with pytest.raises(ModelError, match="is not in memory"):
        residua.extract(
            build_model("gpt2").to("meta"), texts_file, tokenizer=build_tokenizer(), **options
        )


def test_a_cluster_takes_names_alone(model_folder: Path, tmp_path: Path) -> None:
    client: Any = object()
    with pytest.raises(UsageError, match="give paths or hub ids"):
        residua.extract(model_folder, texts(3), root=tmp_path, client=client, **SMALL)
