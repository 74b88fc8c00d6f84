"""Caches and probes at the command line: listed, described, removed, shared between roots."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import residua
from residua.cache.files.leases import lease_part
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.saved.library import earlier_probe_path, probe_path

from ...probes.saved.test_hub import LocalHub, hub  # noqa: F401
from .test_commands import invoke, json_of


@pytest.fixture
def root(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A root with a copy of `tiny_cache`, a ridge probe, a lens and a bigram."""
    root = tmp_path / "root"
    shutil.copytree(tiny_cache.path, root / tiny_cache.id)
    cache = ActivationCache(root / tiny_cache.id)
    lens = residua.TunedLens(layers=[1], steps=2, lr=0.1)
    for probe in (residua.RidgeProbe([0, 1]), lens, residua.Bigram([1, 2])):
        probe.fit(cache)
        residua.save_probe(probe, probe_path(root, probe))
    return root


def answer(text: str, *args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=text)


def test_probes_are_listed_with_all_that_tells_them_apart(
    root: Path, tiny_cache: ActivationCache
) -> None:
    listed = {probe["kind"]: probe for probe in json_of("probes", "--root", root)["probes"]}
    assert set(listed) == {"bigram", "lens", "ridge"}
    ridge, lens = listed["ridge"], listed["lens"]
    assert (ridge["layers"], ridge["offsets"]) == ([0, 1, 2, 3], [0, 1])
    assert ridge["cache"] == tiny_cache.id
    assert ridge["kl"] is None  # the fit does not read the head
    r2 = [row["r2"] for row in residua.load_probe(ridge["path"]).metrics()]
    assert ridge["measure"] == {"name": "r2", "min": min(r2), "max": max(r2)}
    assert listed["bigram"]["measure"] is None
    kl = residua.load_probe(lens["path"]).metrics()[0]["kl"]
    assert lens["kl"] == {"min": kl, "max": kl}
    assert lens["measure"] == {"name": "kl", "min": kl, "max": kl}
    assert listed["bigram"]["layers"] == []
    shown = invoke("probes", "--root", root).stdout
    assert ridge["probe"] in shown
    assert tiny_cache.id[:12] in shown
    assert f"KL {kl:.3g} to {kl:.3g}" in shown
    assert f"R2 {min(r2):.3g} to {max(r2):.3g}" in shown
    assert "KL: KL to the model, nats per position of the validation split" in shown
    assert "R2: R2 of the residual stream that is predicted, cross-validated" in shown


@pytest.mark.parametrize(("loss", "name"), [("kl", "kl"), ("model", "nll"), ("text", "nll_text")])
def test_the_loss_of_a_vocabulary_probe_is_named(
    tiny_cache: ActivationCache, tmp_path: Path, loss: Any, name: str
) -> None:
    probe = residua.VocabProbe(offsets=[0], layers=[1, 2], loss=loss, lr=0.01, epochs=1)
    path = residua.save_probe(probe.fit(tiny_cache), tmp_path / "probes" / "vocab")
    (listed,) = json_of("probes", "--root", tmp_path)["probes"]
    losses = [row["validation"] for row in residua.load_probe(path).metrics()]
    measure = {"min": min(losses), "max": max(losses)}
    assert listed["measure"] == {"name": name, **measure}
    assert listed["kl"] == (measure if loss == "kl" else None)


def test_a_damaged_probe_is_listed_beside_the_others(root: Path) -> None:
    (damaged,) = (root / "probes").glob("lens-*")
    (damaged / "config.json").write_text("{")
    listed = json_of("probes", "--root", root)["probes"]
    states = {probe["probe"].partition("-")[0]: probe["state"] for probe in listed}
    assert states["lens"].startswith("damaged: ")
    assert states["ridge"] == "saved"
    assert "damaged" in invoke("probes", "--root", root).stdout
    assert json_of("info", "lens", "--root", root, code=4)["error"] == "CorruptError"


def test_a_root_without_probes_says_how_to_fit_one(tmp_path: Path) -> None:
    assert json_of("probes", "--root", tmp_path)["probes"] == []
    assert "residua fit ridge" in invoke("probes", "--root", tmp_path).stdout


def test_info_shows_a_probe(root: Path, tiny_cache: ActivationCache) -> None:
    described = json_of("info", "ridge", "--root", root)
    assert described["cache"] == tiny_cache.id
    assert described["params"]["folds"] == 5
    assert [(row["layer"], row["offset"]) for row in described["metrics"]] == [
        (layer, offset) for layer in range(4) for offset in range(2)
    ]
    shown = invoke("info", described["path"]).stdout
    assert "r2" in shown
    assert tiny_cache.id in shown
    assert json_of("info", tiny_cache.id[:6], "--root", root)["positions"] == tiny_cache.positions
    message = invoke("info", "zzz", "--root", root).output
    assert "no cache 'zzz'" in message
    assert "no probe 'zzz'" in message


@pytest.mark.parametrize(
    ("offsets", "name"),
    [
        (0, "n0"),
        ([3, 0, 1, 2], "n0-3"),
        ([0, 2, 5], "n0+2+5"),
        (range(0, 96, 2), "n0..94"),
    ],
)
def test_the_name_of_a_probe_says_kind_cache_and_offsets(
    offsets: Any, name: str, tmp_path: Path
) -> None:
    probe = residua.RidgeProbe(offsets)
    path = probe_path(tmp_path, probe, "3f2a51c09d7e" + "0" * 52)
    assert path.name.startswith(f"ridge-3f2a51c09d7e-{name}-")
    earlier = earlier_probe_path(tmp_path, probe, "3f2a51c09d7e" + "0" * 52).name
    assert earlier == path.name.replace(f"-{name}-", "-")
    control = residua.ControlProbe(probe, "next-token")
    assert probe_path(tmp_path, control, "3f2a51c09d7e").name.startswith(
        f"next-token-ridge-3f2a51c09d7e-{name}-"
    )


def test_a_fit_under_its_earlier_name_keeps_it(root: Path, tiny_cache: ActivationCache) -> None:
    ridge = residua.RidgeProbe([0, 1])
    path = probe_path(root, ridge, tiny_cache.id)
    earlier = earlier_probe_path(root, ridge, tiny_cache.id)
    path.rename(earlier)
    command = ("fit", "ridge", tiny_cache.id, "--offsets", "0-1", "--root", root)
    assert json_of(*command)["probe"] == str(earlier)
    assert not path.exists()


def test_rm_asks_and_removes(root: Path, tiny_cache: ActivationCache) -> None:
    kept = answer("n\n", "rm", tiny_cache.id[:8], "ridge", "--force", "--root", root)
    assert kept.exit_code == 0, kept.output
    assert "Remove?" in kept.output
    assert "nothing was removed" in kept.output
    assert (root / tiny_cache.id).exists()
    removed = answer("y\n", "rm", tiny_cache.id[:8], "ridge", "--force", "--root", root)
    assert removed.exit_code == 0, removed.output
    assert json_of("ls", "--root", root)["caches"] == []
    assert {probe["kind"] for probe in json_of("probes", "--root", root)["probes"]} == {
        "bigram",
        "lens",
    }
    gone = json_of("rm", "lens", "bigram", "--yes", "--root", root)["removed"]
    assert [entry["kind"] for entry in gone] == ["probe", "probe"]
    assert json_of("probes", "--root", root)["probes"] == []


def test_rm_removes_nothing_without_an_answer_or_with_a_wrong_name(
    root: Path, tiny_cache: ActivationCache
) -> None:
    silent = answer("", "rm", "ridge", "--root", root)
    assert silent.exit_code == 2
    assert "give --yes" in silent.output
    assert "--yes" in json_of("rm", "ridge", "--root", root, code=2)["message"]
    assert json_of("rm", "ridge", "zzz", "--yes", "--root", root, code=2)["exit_code"] == 2
    assert len(json_of("probes", "--root", root)["probes"]) == 3


def test_rm_refuses_a_cache_that_is_being_written(root: Path, tiny_cache: ActivationCache) -> None:
    with lease_part(root / tiny_cache.id / "leases", 0):
        failed = json_of("rm", tiny_cache.id, "--yes", "--force", "--root", root, code=2)
    assert "is being written by process" in failed["message"]
    assert residua.verify(root / tiny_cache.id).ok


def test_rm_leaves_a_cache_that_probes_name_unless_they_go_too(
    root: Path, tiny_cache: ActivationCache
) -> None:
    refused = json_of("rm", tiny_cache.id, "--yes", "--root", root, code=2)
    assert refused["error"] == "InUseError"
    assert all(f"probe {kind}-" in refused["message"] for kind in ("ridge", "lens", "bigram"))
    names = ("ridge", "lens", tiny_cache.id)
    assert "bigram-" in json_of("rm", *names, "--yes", "--root", root, code=2)["message"]
    assert len(json_of("probes", "--root", root)["probes"]) == 3
    gone = json_of("rm", *names, "bigram", "--yes", "--root", root)["removed"]
    assert [entry["kind"] for entry in gone] == ["probe", "probe", "cache", "probe"]
    assert json_of("ls", "--root", root)["caches"] == []


def test_rm_refuses_a_folder_that_holds_more_than_a_probe(root: Path) -> None:
    (folder,) = (root / "probes").glob("ridge-*")
    (folder / "notes.txt").write_text("mine")
    failed = json_of("rm", "ridge", "--yes", "--root", root, code=2)
    assert "notes.txt" in failed["message"]
    assert (folder / "notes.txt").is_file()


def test_rm_says_which_caches_extend_a_removed_one(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = {"root": tmp_path, "context": 64, "part_positions": 512}
    short = residua.extract(model_folder, texts_file, max_tokens=2048, **options)
    long = residua.extract(model_folder, texts_file, max_tokens=4096, **options)
    asked = answer("n\n", "rm", short.id, "--force", "--root", tmp_path)
    assert "are shared with other caches, and stay" in asked.output
    assert f"extended by {long.id[:12]}" in asked.output
    refused = json_of("rm", short.id, "--yes", "--root", tmp_path, code=2)
    assert (refused["error"], short.complete) == ("InUseError", True)
    assert f"cache {long.id[:12]}, which extends it" in refused["message"]
    (entry,) = json_of("rm", short.id, "--yes", "--force", "--root", tmp_path)["removed"]
    assert entry["extended_by"] == [long.id]
    assert residua.verify(long.path).ok


def test_push_and_pull_go_from_root_to_root(
    root: Path, tiny_cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    pushed = json_of("push", tiny_cache.id[:6], shared, "--root", root)
    assert (pushed["status"], pushed["path"]) == ("copied", str(shared / tiny_cache.id))
    probe = json_of("push", "ridge", shared, "--root", root)
    assert probe["path"] == str(shared / "probes" / probe["probe"])

    pulled = json_of("pull", shared / tiny_cache.id[:6], "--root", mine)
    assert pulled["cache"] == tiny_cache.id
    assert json_of("pull", shared / tiny_cache.id[:6], "--root", mine)["status"] == "hit"
    again = json_of("pull", shared / "probes" / "ridge", "--root", mine)
    assert again["status"] == "copied"
    assert json_of("pull", probe["path"], "--root", mine)["status"] == "hit"

    direct = residua.load_probe(next((root / "probes").glob("ridge-*")))
    copy = residua.load_probe(again["path"])
    np.testing.assert_array_equal(copy.map(1, 0).weight, direct.map(1, 0).weight)
    assert json_of("evaluate", tiny_cache.id, "ridge", "--root", mine)["rows"]
    monkeypatch.chdir(tmp_path)
    assert json_of("pull", f"shared/{tiny_cache.id[:6]}", "--root", mine)["status"] == "hit"
    shown = invoke("push", tiny_cache.id, shared, "--root", root).stdout
    assert f"next: residua info {tiny_cache.id[:12]} --root {shared}" in shown


def test_wrong_sources_and_targets_say_what_is_expected(
    root: Path, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    private = json_of("push", tiny_cache.id, tmp_path, "--private", "--root", root, code=2)
    assert "are for the hub" in private["message"]
    other = json_of("pull", root / tiny_cache.id, "--expect", "0" * 8, "--root", tmp_path, code=3)
    assert other["error"] == "MismatchError"
    whole_root = json_of("pull", root, "--root", tmp_path, code=2)
    assert f"(it has: {tiny_cache.id[:12]})" in whole_root["message"]
    missing = json_of("pull", root / "nothing", "--root", tmp_path, code=2)
    assert "no cache 'nothing'" in missing["message"]
    (folder,) = (root / "probes").glob("ridge-*")
    taken = tmp_path / "taken" / "probes" / folder.name
    shutil.copytree(next((root / "probes").glob("lens-*")), taken)
    clash = json_of("push", "ridge", tmp_path / "taken", "--root", root, code=3)
    assert "holds another probe" in clash["message"]


def test_a_changed_probe_is_not_copied(root: Path, tmp_path: Path) -> None:
    (folder,) = (root / "probes").glob("ridge-*")
    data = bytearray((folder / "probe.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "probe.safetensors").write_bytes(data)
    assert json_of("push", "ridge", tmp_path / "there", "--root", root, code=4)["exit_code"] == 4
    assert not list((tmp_path / "there").rglob("*.safetensors"))


def test_verify_ends_with_the_command_that_mends(root: Path, tiny_cache: ActivationCache) -> None:
    assert json_of("verify", tiny_cache.id, "--root", root)["next"] is None
    shard = root / tiny_cache.id / "arrays.zarr/residual/1/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    command = f"residua repair {tiny_cache.id[:12]} --root {root}"
    assert json_of("verify", tiny_cache.id, "--root", root, code=4)["next"] == command
    shown = invoke("verify", tiny_cache.id, "--root", root)
    assert shown.stdout.splitlines()[-1] == f"next: {command}"
    assert invoke(*command.split()[1:]).exit_code == 0
    assert residua.verify(root / tiny_cache.id).ok


def test_probes_are_pushed_to_the_hub_and_pulled_from_it(
    root: Path,
    tiny_cache: ActivationCache,
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine"
    pushed = json_of("push", "lens", "someone/lens", "--root", root)
    pulled = json_of("pull", "someone/lens", "--root", mine)
    assert (pulled["status"], pulled["kind"]) == ("pulled", "probe")
    # The folder has the name of the fit, and the bytes that were pushed.
    assert pulled["probe"] == pushed["probe"]
    for name in ("config.json", "probe.safetensors"):
        copy = Path(pulled["path"], name).read_bytes()
        assert copy == (root / "probes" / pushed["probe"] / name).read_bytes()
    assert json_of("pull", "someone/lens", "--kind", "probe", "--root", mine)["status"] == "hit"
    shown = invoke("pull", "someone/lens", "--root", mine).stdout
    assert f"next: residua info {pulled['probe']} --root" in shown
    cache = json_of("pull", "someone/lens", "--kind", "cache", "--root", mine, code=2)
    assert "no dataset repository" in cache["message"]
    other = json_of("pull", "someone/lens", "--expect", "0" * 8, "--root", tmp_path, code=3)
    assert tiny_cache.id[:12] in other["message"]
    neither = json_of("pull", "someone/nothing", "--root", mine, code=2)
    assert "no dataset repository 'someone/nothing'" in neither["message"]
    assert "no model repository 'someone/nothing'" in neither["message"]
    path = json_of("pull", root / tiny_cache.id, "--kind", "cache", "--root", mine, code=2)
    assert "--kind is for the hub" in path["message"]


def completions(words: str, root: Path) -> list[str]:
    """What bash is offered for the last of `words`."""
    environment = {"_RESIDUA_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment |= {"COMP_CWORD": str(len(words.split()) - 1), "RESIDUA_ROOT": str(root)}
    result = CliRunner().invoke(main, [], prog_name="residua", env=environment)
    return [line.partition(",")[2] for line in result.output.splitlines() if line]


def test_the_shell_completes_commands_caches_and_probes(
    root: Path, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    short = tiny_cache.id[:12]
    assert completions("residua ver", root) == ["verify"]
    assert completions(f"residua verify {short[:4]}", root) == [short]
    assert completions(f"residua fit ridge {short[:4]}", root) == [short]
    (probe,) = completions("residua info ri", root)
    assert probe.startswith(f"ridge-{short}-n0-1-")
    assert completions(f"residua evaluate {short} lens", root)[0].startswith("lens-")
    assert completions("residua verify ri", root) == []
    assert completions("residua info x", tmp_path / "none") == []
