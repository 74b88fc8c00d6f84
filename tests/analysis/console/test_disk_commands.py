"""`residua du`, `gc` and `pin`: they show first, ask, and say what they did."""

import shutil
from pathlib import Path

import pytest

import residua
from residua.analysis.console.options import parse_duration
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import probe_path

from .test_commands import invoke, json_of
from .test_saved_commands import answer


@pytest.fixture
def root(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A root with a cache that nothing names, and a leftover."""
    root = tmp_path / "root"
    # Other tests keep moments in this cache.
    without_moments = shutil.ignore_patterns("moments")
    shutil.copytree(tiny_cache.path, root / tiny_cache.id, ignore=without_moments)
    (root / f".new-{'0' * 32}").mkdir()
    (root / f".new-{'0' * 32}" / "rows").write_bytes(b"rows")
    return root


def test_du_shows_what_is_there_and_what_could_go(root: Path, tiny_cache: ActivationCache) -> None:
    (root / "notes.txt").write_text("mine")
    value = json_of("du", "--root", root)
    sizes = {item["kind"]: item["bytes"] for item in value["items"]}
    size = ActivationCache(root / tiny_cache.id).bytes
    assert sizes == {"cache": size, "leftover": 4, "foreign": 4}
    assert value["bytes"] == size + 8
    assert value["would_free"]["unused-caches"] == size
    shown = invoke("du", "--root", root).stdout
    assert tiny_cache.id[:12] in shown
    assert "nothing" in shown
    assert "a cache whose making was stopped" in shown
    assert f"residua gc --unused-caches --root {root}" in shown
    assert "never touched" in shown
    assert "nothing under" in invoke("du", "--root", root / "none").stdout


def test_gc_shows_asks_and_removes(root: Path, tiny_cache: ActivationCache) -> None:
    left = root / f".new-{'0' * 32}"
    shown = invoke("gc", "--dry-run", "--root", root).stdout
    assert "1 to remove, 4 B would be freed" in shown
    kept = answer("n\n", "gc", "--root", root)
    assert kept.exit_code == 0, kept.output
    assert "nothing was removed" in kept.output
    assert left.is_dir()
    assert "--dry-run" in json_of("gc", "--root", root, code=2)["message"]
    silent = answer("", "gc", "--root", root)
    assert silent.exit_code == 2
    assert left.is_dir()
    done = answer("y\n", "gc", "--root", root)
    assert "1 removed, 4 B freed" in done.output
    assert not left.exists()
    assert json_of("gc", "--root", root)["items"] == []
    assert (root / tiny_cache.id).is_dir()


def test_gc_removes_unused_caches_of_an_age(root: Path, tiny_cache: ActivationCache) -> None:
    category = ("gc", "--unused-caches", "--yes", "--root", root)
    young = json_of(*category, "--older-than", "30d")
    assert young["items"] == []
    assert young["kept"][0]["reason"].startswith("it was used ")
    size = ActivationCache(root / tiny_cache.id).bytes
    gone = json_of(*category)
    assert (gone["freed"], gone["removed"]) == (size, True)
    assert json_of("ls", "--root", root)["caches"] == []
    assert (root / f".new-{'0' * 32}").is_dir()  # another category
    assert json_of("gc", "--older-than", "soon", "--root", root, code=2)["error"] == "UsageError"


def test_pins_keep_from_gc_and_rm(root: Path, tiny_cache: ActivationCache) -> None:
    pinned = json_of("pin", tiny_cache.id[:6], "--reason", "figures\x1b[2J", "--root", root)
    assert pinned["pins"][0]["name"] == tiny_cache.id
    shown = invoke("pin", "--root", root).stdout
    assert tiny_cache.id[:12] in shown
    assert "\x1b" not in shown
    kept = json_of("gc", "--unused-caches", "--yes", "--root", root)["kept"]
    assert "a pin (figures" in kept[0]["reason"]
    refused = json_of("rm", tiny_cache.id, "--yes", "--root", root, code=2)
    assert "residua pin --remove" in refused["message"]
    json_of("pin", "--remove", tiny_cache.id[:6], "--root", root)
    assert json_of("pin", "--root", root)["pins"] == []
    assert "nothing is pinned" in invoke("pin", "--root", root).stdout
    assert json_of("pin", "--remove", "--root", root, code=2)["error"] == "UsageError"
    assert len(json_of("rm", tiny_cache.id, "--yes", "--root", root)["removed"]) == 1


def test_a_probe_outside_a_root_cannot_be_pinned(root: Path, tmp_path: Path) -> None:
    cache = ActivationCache(next(root.glob("[0-9a-f]*")))
    probe = residua.RidgeProbe([0], layers=[1]).fit(cache, keep=False)
    outside = residua.save_probe(probe, tmp_path / "outside")
    assert "outside a root" in json_of("pin", outside, "--root", root, code=2)["message"]
    inside = residua.save_probe(probe, probe_path(root, probe))
    assert json_of("pin", "ridge", "--root", root)["pins"][0]["name"] == inside.name


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2_592_000), ("1.5 h", 5400), ("2W", 1_209_600), ("0", 0)]
)
def test_times_have_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    for wrong in ("30", "d", "-1d", "1e3d", "1y", ""):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_duration(wrong)
