"""Saved probes of strangers: what no fit gives is refused when it is read."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from residua.cache.errors import CorruptError, MismatchError, UsageError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.saved_tensors import SavedTensors
from residua.probes.saved.save import check_belongs, load_probe

TESTS = Path(__file__).parents[2]
PROBES = TESTS / "format2" / "probes"


def forged_probe(
    folder: Path, kind: str, forge: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
) -> Path:
    """A copy of a saved probe that `forge` changed, with digests that are right."""
    shutil.copytree(PROBES / kind, folder / kind)
    config, tensors = read_json(folder / kind / "config.json"), folder / kind / "probe.safetensors"
    arrays = load_file(tensors)
    forge(config, arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tensors)
    config["tensors"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    write_json(folder / kind / "config.json", config)
    return folder / kind


@pytest.mark.parametrize(
    ("kind", "forge"),
    [
        ("ridge", lambda c, t: c.pop("split")),
        ("ridge", lambda c, t: c.pop("residua")),
        ("ridge", lambda c, t: c.update(d_model="32")),
        ("ridge", lambda c, t: c.update(d_model=1 << 40)),
        ("ridge", lambda c, t: c.update(d_model=31)),
        ("ridge", lambda c, t: c.update(geometry=0.5)),
        ("ridge", lambda c, t: c.update(pairs={})),
        ("ridge", lambda c, t: c["pairs"].append(None)),
        ("ridge", lambda c, t: c["pairs"][0].pop("layer")),
        ("ridge", lambda c, t: c["pairs"][0].update(layer=-1)),
        ("ridge", lambda c, t: c["pairs"][0].update(offset=True)),
        ("ridge", lambda c, t: c["pairs"][0].update(alpha="x")),
        ("ridge", lambda c, t: c["pairs"][0].update(alpha=123.0)),
        ("ridge", lambda c, t: c.pop("params")),
        ("ridge", lambda c, t: c["params"].update(surprise=1)),
        ("ridge", lambda c, t: c.update(feature_names=[1])),
        ("ridge", lambda c, t: c.update(param_types={"offset": 7})),
        ("ridge", lambda c, t: c.update(param_types={"offset": "array U99999999"})),
        ("ridge", lambda c, t: c.update(param_types={"absent": "tuple"})),
        ("lens", lambda c, t: t.update({"0.0.weight": t["0.0.weight"][:5]})),
        ("lens", lambda c, t: t.update({"0.0.weight": t["0.0.weight"].astype("i4")})),
        ("lens", lambda c, t: t.pop("0.0.bias")),
        ("vocab", lambda c, t: c.update(vocab=1 << 26)),
        ("vocab", lambda c, t: c.update(vocab=1 << 60)),
        ("vocab", lambda c, t: c.update(classes=[1, 2])),
        ("vocab", lambda c, t: c.update(classes=["a"] * 300, classes_dtype="<U99999")),
        ("vocab", lambda c, t: c.update(classes=[0] * 300, classes_dtype="V8")),
        ("vocab", lambda c, t: t.update({"1.0.weight": t["1.0.weight"].T})),
        ("bigram", lambda c, t: t["pairs.row"].fill(5)),
        ("bigram", lambda c, t: t["pairs.column"].fill(300)),
        ("bigram", lambda c, t: t["pairs.column"].fill(-1)),
        ("bigram", lambda c, t: t["pairs.count"].fill(-1)),
        ("bigram", lambda c, t: t.update({"pairs.row": t["pairs.row"][:, None]})),
        ("bigram", lambda c, t: t.update(unigram=t["unigram"][:7])),
        ("chain", lambda c, t: t.update(depth=np.zeros(0, np.int64))),
        ("unigram", lambda c, t: t.update(count=t["count"][1:])),
        ("trigram", lambda c, t: t.update(contexts=t["contexts"][1:])),
        ("control", lambda c, t: c.pop("fitted")),
        ("control", lambda c, t: c["fitted"].pop("cache")),
        ("control", lambda c, t: c["params"].update(probe=3)),
        ("control", lambda c, t: c["params"]["probe"].update(kind="pickle")),
    ],
)
def test_what_no_fit_gives_is_refused(
    kind: str, forge: Callable[[dict[str, Any], dict[str, np.ndarray]], Any], tmp_path: Path
) -> None:
    path = forged_probe(tmp_path, kind, forge)
    with pytest.raises(CorruptError, match=kind):
        load_probe(path)


@pytest.mark.parametrize("kind", ["pickle", "", 3, None, "ridge/../x", ["ridge"]])
def test_an_unknown_kind_is_said(kind: Any, tmp_path: Path) -> None:
    path = forged_probe(tmp_path, "ridge", lambda c, t: c.update(kind=kind))
    with pytest.raises((UsageError, CorruptError), match="kind"):
        load_probe(path)


@pytest.mark.parametrize(
    "data", [b"", b"x" * 100, (1 << 62).to_bytes(8, "little") + b"{}", b"\2" + b"\0" * 7 + b"{}x"]
)
def test_bytes_that_are_no_tensors_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptError, match="no file of tensors"):
        SavedTensors.parse(data, "probe.safetensors")


def test_a_tensor_of_too_many_axes_or_another_dtype_is_corrupt(tmp_path: Path) -> None:
    for entry in (
        '{"dtype":"F32","shape":[' + "1," * 80 + '1],"data_offsets":[0,4]}',
        '{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}',
    ):
        text = b'{"a":' + entry.encode() + b"}"
        with pytest.raises(CorruptError):
            SavedTensors.parse(len(text).to_bytes(8, "little") + text + b"\0" * 4, "file")


def test_a_probe_of_other_widths_belongs_to_no_cache(tmp_path: Path) -> None:
    path = next(p for p in (TESTS / "format2" / "root").iterdir() if p.name.startswith("69cc"))
    cache = ActivationCache(path)

    def narrow(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith((".weight", ".bias"))]:
            tensors[name] = tensors[name][..., :5]

    check_belongs(load_probe(PROBES / "ridge"), cache)
    for kind in ("ridge", "lens"):
        with pytest.raises(MismatchError, match="gives states of width 5"):
            check_belongs(load_probe(forged_probe(tmp_path, kind, narrow)), cache)

    def fewer_tokens(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["unigram"], tensors["count"] = tensors["unigram"][:9], tensors["count"][:9]

    with pytest.raises(MismatchError, match="counted 9 tokens"):
        check_belongs(load_probe(forged_probe(tmp_path, "unigram", fewer_tokens)), cache)
