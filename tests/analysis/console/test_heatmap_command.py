"""`residua heatmap`: passages and own texts, differences, files; and names for probes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.analysis.console.probe_names import split_name
from residua.analysis.display.lens_maps import MEASURES
from residua.analysis.jobs.job_commands import named_probe
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import MAP_MEASURES

from .test_commands import invoke, json_of
from .test_saved_commands import completions


@pytest.fixture(scope="module")
def root(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a copy of `tiny_cache`, a ridge probe and a lens."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    cache = ActivationCache(root / tiny_cache.id)
    lens = residua.TunedLens(layers=[1, 2], steps=2, lr=0.1)
    for name, probe in {"ridge": residua.RidgeProbe([0, 1]), "lens": lens}.items():
        residua.save_probe(probe.fit(cache), root / "probes" / name)
    return root


def test_a_passage_of_the_cache_is_read_as_in_python(
    root: Path, tiny_cache: ActivationCache
) -> None:
    command = ["heatmap", tiny_cache.id[:12], "ridge", "--root", root]
    passage = ["--sequence", 2, "--first", 3, "--tokens", 5]
    value = json_of(*command, *passage, "--offsets", "0-1", "--layers", "1,-1", "--measure", "kl")
    ridge = residua.load_probe(root / "probes" / "ridge")
    place = residua.CachePassage(tiny_cache, sequence=2, start=3, width=5)
    expected = ridge.heatmap(place, offsets=[0, 1], layers=[1, 3], measure="kl")
    assert value["maps"] == expected.to_dicts()
    assert (value["measure"], value["passage"]) == ("kl", "sequence 2, token 3")
    shown = invoke(*command, *passage).stdout
    assert "ridge lens at N = 0 (next token); sequence 2, token 3" in shown
    assert f"{expected[0].top[0][0][0]} " in shown
    assert "*: as the last layer says" in shown


def test_the_logit_lens_is_read_without_a_probe(root: Path, tiny_cache: ActivationCache) -> None:
    value = json_of("heatmap", tiny_cache.id[:12], "--root", root)
    (entry,) = value["maps"]
    assert (entry["lens"], entry["layers"]) == ("logit", list(tiny_cache.layers))
    assert all(entry["agrees"][-1])


def test_own_text_is_read_by_the_model(
    root: Path, tiny_cache: ActivationCache, model_folder: Path
) -> None:
    command = ["heatmap", tiny_cache.id[:12], "lens", "--root", root]
    own = ["--text", "the cat sat on the mat", "--track", " the"]
    value = json_of(*command, *own, "--measure", "rank")
    assert value["passage"] == "own text"
    assert value["tracked"] == "␣the"
    assert json_of(*command, *own, "--measure", "rank", "--model", model_folder) == value
    lens = residua.load_probe(root / "probes" / "lens")
    text = "the cat sat on the mat"
    expected = lens.heatmap(text, cache=tiny_cache, track=" the")
    np.testing.assert_allclose(value["maps"][0]["rank"], expected[0].values["rank"])


def test_a_difference_is_that_of_two_probes(
    root: Path, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    command = ["heatmap", tiny_cache.id[:12], "--root", root, "tuned=lens", "logit"]
    page, picture = tmp_path / "new" / "map.html", tmp_path / "map.png"
    files = ["--html", page, "--png", picture]
    value = json_of(*command, "--difference", "--measure", "kl", *files)
    (entry,) = value["maps"]
    assert (entry["lens"], entry["layers"]) == ("tuned - logit", [1, 2])
    both = {m["lens"]: m for m in json_of(*command, "--measure", "kl")["maps"]}
    np.testing.assert_allclose(
        entry["kl"], np.array(both["tuned"]["kl"]) - np.array(both["logit"]["kl"])[1:3], atol=1e-12
    )
    assert value["files"] == [str(page), str(picture)]
    assert "tuned - logit lens at N = 0" in page.read_text()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    shown = invoke(*command, "--difference").stdout
    assert "*: both lenses say the same" in shown


def test_layers_that_do_not_fit_a_terminal_are_counted(
    root: Path, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residua.analysis.console.heatmap_actions.MOST_LAYERS", 3)
    shown = invoke("heatmap", tiny_cache.id[:12], "--root", root).stdout
    assert "1 more layers are not shown" in shown
    assert "layer 0" in shown
    assert "layer 3" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "the cat", "--sequence", 1], "--sequence is for a passage of the cache"),
        (["--model", "gpt2"], "the model reads a text of your own"),
        (["--first", 3], "give --sequence too"),
        (["--sequence", 1, "--split", "train"], "leave it or --sequence out"),
        (["--difference"], "a difference is that of two lenses, not 0"),
        (["--text", " "], "the text is empty"),
        (["--png", "map.pdf"], "name it map.png"),
        (["--html", "map.pdf"], "name it map.html"),
        (["--layers", "99"], "does not read layers 99"),
        (["a=lens", "a=ridge"], "two probes are named 'a'"),
        (["=lens"], "names no probe; write NAME=PROBE"),
        (["--track", " the cat"], "is not one token of this model"),
    ],
)
def test_mistakes_are_named_in_one_line(
    root: Path, tiny_cache: ActivationCache, options: list[object], message: str
) -> None:
    result = invoke("heatmap", tiny_cache.id[:12], *options, "--root", root)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_evaluate_names_probes_as_asked(
    root: Path, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    command = ["evaluate", tiny_cache.id[:12], "--root", root, "--max-positions", 256]
    value = json_of(*command, "long=ridge", "lens", "second=ridge", "--png", tmp_path / "png")
    assert {row["probe"] for row in value["rows"]} >= {"long", "lens", "second"}
    assert any(note.startswith("long is RidgeProbe(") for note in value["notes"])
    # Several offsets: the figure of the Future Lens is among the pictures.
    assert str(tmp_path / "png" / "future_lens.png") in value["files"]
    picture = (tmp_path / "png" / "future_lens.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    one = json_of(*command, "lens", "--offsets", 0, "--png", tmp_path / "one")
    assert not any("future_lens" in path for path in one["files"])


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a=b"
    path.mkdir()
    assert split_name(str(path)) == (None, str(path))
    assert split_name("s3://bucket/a=b") == (None, "s3://bucket/a=b")
    assert split_name(f"long={path}") == ("long", str(path))
    assert split_name("ridge") == (None, "ridge")
    with pytest.raises(UsageError, match="names no probe"):
        split_name("long=")


def test_jobs_of_a_service_take_named_probes_and_no_paths(root: Path) -> None:
    assert named_probe(root, "long=ri") == "long=ridge"
    assert named_probe(root, "ri") == "ridge"
    for argument in ("../x=ridge", "a/b=ridge", "long=../ridge", "long=", 3):
        with pytest.raises(NotFoundError, match="no probe"):
            named_probe(root, argument)


def test_the_shell_completes_named_probes(root: Path, tiny_cache: ActivationCache) -> None:
    assert completions(f"residua heatmap {tiny_cache.id[:12]} ri", root) == ["ridge"]
    assert completions(f"residua evaluate {tiny_cache.id[:12]} long=le", root) == ["long=lens"]
    # bash divides words at the sign, and replaces what follows it.
    assert completions(f"residua evaluate {tiny_cache.id[:12]} long = le", root) == ["lens"]
    assert completions(f"residua info {tiny_cache.id[:3]}", root) == [tiny_cache.id[:12]]


def test_measures_of_the_command_are_those_of_maps() -> None:
    assert MAP_MEASURES == MEASURES
