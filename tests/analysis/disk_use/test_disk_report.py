"""Disk use counts hard links once, knows leftovers of killed work, and leaves others' files."""

import os
import shutil
import time
from pathlib import Path

import pytest

import residua
from residua.analysis.disk_use import file_tally
from residua.analysis.disk_use.collection import CATEGORIES, collect, plan_collection
from residua.analysis.disk_use.disk_report import DiskItem, DiskReport, measure_disk
from residua.cache.files.leases import hold_lock, lease_part
from residua.cache.files.paths import as_path
from residua.cache.files.staging import resumable_staging_folder, staging_folder
from residua.cache.sharing.root_transfer import copy_cache
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import checkpoint_path, probe_path
from residua.probes.training.checkpoint import Checkpoint

from ...support.crashing import shared_driver, wait_until
from ...support.killed_work import run_killed
from ...support.scenes import Scene, write_texts


@pytest.fixture
def cache(tiny_cache: ActivationCache, tmp_path: Path) -> ActivationCache:
    """A copy of `tiny_cache` under a root of its own."""
    without_moments = shutil.ignore_patterns("moments")
    shutil.copytree(tiny_cache.path, tmp_path / "root" / tiny_cache.id, ignore=without_moments)
    return ActivationCache(tmp_path / "root" / tiny_cache.id)


def bytes_by_inode(folder: Path) -> dict[tuple[int, int], int]:
    """Sizes of all files under `folder`, by device and number."""
    files = [path.lstat() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {(status.st_dev, status.st_ino): status.st_size for status in files}


def item_of(report: DiskReport, kind: str, name: str) -> DiskItem:
    (item,) = [item for item in report.of_kind(kind) if item.name == name]
    return item


def free_after_removal(folder: Path, root: Path) -> int:
    """Bytes that really go when `folder` goes: of files that have no name elsewhere."""
    before = bytes_by_inode(root)
    shutil.rmtree(folder)
    after = bytes_by_inode(root)
    return sum(size for inode, size in before.items() if inode not in after)


def test_files_that_two_caches_share_count_once(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = {"root": tmp_path, "context": 64, "part_positions": 512}
    short = residua.extract(model_folder, texts_file, max_tokens=2048, **options)
    long = residua.extract(model_folder, texts_file, max_tokens=4096, **options)
    report = measure_disk(tmp_path)
    items = report.of_kind("cache")
    assert [item.name for item in items] == [long.id, short.id]
    inodes = bytes_by_inode(tmp_path)
    assert report.bytes == sum(inodes.values())
    assert sum(item.bytes for item in items) > report.bytes + 2048 * 32 * 2 * 3
    assert report.freed_by(items) == report.bytes
    for item in items:
        assert item.bytes == sum(bytes_by_inode(tmp_path / item.name).values())
        assert sum(item.contents.values()) == item.bytes
    freed = item_of(report, "cache", short.id).freed
    assert 0 < freed < short.bytes
    assert freed == free_after_removal(short.path, tmp_path)
    assert measure_disk(tmp_path).of_kind("cache")[0].freed == sum(
        bytes_by_inode(tmp_path).values()
    )


def test_a_copy_under_another_root_keeps_its_bytes(cache: ActivationCache, tmp_path: Path) -> None:
    copy_cache(cache, tmp_path / "other", verify=False)
    item = item_of(measure_disk(cache.path.parent), "cache", cache.id)
    manifest_and_shards = item.bytes - item.freed
    assert manifest_and_shards > 0.9 * item.bytes
    plan = plan_collection(cache.path.parent, ["unused-caches"])
    assert plan.freed == item.freed
    shutil.rmtree(tmp_path / "other")
    assert item_of(measure_disk(cache.path.parent), "cache", cache.id).freed == item.bytes


def test_two_names_in_one_item_count_once(cache: ActivationCache) -> None:
    before = item_of(measure_disk(cache.path.parent), "cache", cache.id)
    os.link(cache.path / "manifest.json", cache.path / "manifest.copy")
    after = item_of(measure_disk(cache.path.parent), "cache", cache.id)
    assert (after.bytes, after.freed, after.files) == (before.bytes, before.freed, before.files + 1)


LEFT = {
    "copy": ("other", ".copy-"),
    "removal": ("root", ".rm-"),
    "probe": ("root", "probes/.residua-probe-"),
    "probe file": ("root", "probes/ridge"),
    "moments": ("root", "CACHE/moments/."),
    "record": ("root", "CACHE/journal/.00000001.1.json."),
    "shard": ("root", "CACHE/arrays.zarr/residual/1/c/1/.0."),
    "layers": ("root", "CACHE/arrays.zarr/zarr."),
    "pin": ("root", ".pins/."),
}
"""Work that is killed -> the root and the beginning of the name of what it leaves."""


@pytest.mark.parametrize("work", LEFT)
def test_what_killed_work_left_is_found_and_collected(
    work: str, cache: ActivationCache, tmp_path: Path
) -> None:
    root_name, prefix = LEFT[work]
    if work == "probe file":
        probe = residua.RidgeProbe([0], layers=[1]).fit(cache, keep=False)
        residua.save_probe(probe, probe_path(tmp_path / "root", probe))
    root = tmp_path / root_name
    run_killed(work, cache.path, tmp_path / "other" if root_name == "other" else root)
    report = measure_disk(root)
    (left,) = report.of_kind("leftover")
    assert left.name.startswith(prefix.replace("CACHE", cache.id))
    assert not left.in_use
    assert (root / left.name).exists()
    # A copy that can go on stays for a week, unless the user says otherwise.
    plan = plan_collection(root, older_than=0.0)
    assert bool(plan_collection(root).removals) == (work != "copy")
    assert [removal.item for removal in plan.removals] == [left]
    collected = collect(plan)
    assert [removal.item for removal in collected.removed] == [left]
    assert not (root / left.name).exists()
    assert measure_disk(root).of_kind("leftover") == []
    if work not in ("removal", "copy"):
        assert residua.verify(cache.path).ok


@pytest.mark.slow
def test_what_a_killed_extraction_left_is_found_and_collected(
    model_folder: Path, tmp_path: Path
) -> None:
    scene, root = Scene(model_folder, write_texts(tmp_path)), tmp_path / "root"
    root.mkdir()
    driver = shared_driver()
    seen = driver.visible_path(root)
    for pattern in (".new-*", "*/arrays.zarr/residual/*/c/*/.*.tmp"):
        for _ in range(20):
            child = driver.start(*scene.command(root))
            wait_until(lambda p=pattern, c=child: list(seen.glob(p)) or c.ended())
            child.kill()
            if list(seen.glob(pattern)):
                break
            shutil.rmtree(seen)
            seen.mkdir()
        report = measure_disk(seen)
        assert report.of_kind("leftover")
        assert not any(item.in_use for item in report.of_kind("leftover"))
        assert not report.of_kind("foreign")
        collect(plan_collection(seen))
        assert list(seen.rglob(".*")) == []
    driver.run(*scene.command(root))
    (path,) = [path for path in seen.iterdir() if path.name[0] != "."]
    assert residua.verify(path).ok


def test_what_a_living_process_writes_stays(cache: ActivationCache) -> None:
    root = cache.path.parent
    shard = cache.path / "arrays.zarr/residual/1/c/1/.0.77.tmp"
    shard.write_bytes(b"rows")
    with (
        staging_folder(root, ".new-") as new,
        resumable_staging_folder(root / f".copy-{'0' * 32}", ()) as copy,
        staging_folder(cache.path / "moments", ".", ".tmp") as moments,
        lease_part(cache.path / "leases", 1),
        hold_lock(cache.path / "leases", "layers"),
    ):
        (cache.path / "arrays.zarr" / f"zarr.{'0' * 32}.partial").write_text("{}")
        for folder in (new, copy, moments):
            (folder / "file").write_bytes(b"rows")
        report = measure_disk(root)
        items = report.of_kind("leftover")
        assert len(items) == 5
        assert all(item.in_use for item in items)
        plan = plan_collection(root, older_than=0.0)
        assert plan.removals == ()
        assert {item.reason for item in plan.kept} == {"a process works at it"}
        shutil.rmtree(copy)
    plan = plan_collection(root, older_than=0.0)
    assert {removal.item.name for removal in plan.removals} == {
        f"{cache.id}/arrays.zarr/residual/1/c/1/.0.77.tmp",
        f"{cache.id}/arrays.zarr/zarr.{'0' * 32}.partial",
    }


def test_a_maker_that_comes_after_the_plan_keeps_its_work(cache: ActivationCache) -> None:
    root = cache.path.parent
    shard = cache.path / "arrays.zarr/residual/1/c/1/.0.77.tmp"
    shard.write_bytes(b"rows")
    folder = root / f".copy-{'0' * 32}"
    folder.mkdir()
    plan = plan_collection(root, older_than=0.0)
    assert len(plan.removals) == 2
    with resumable_staging_folder(folder, ()), lease_part(cache.path / "leases", 1):
        collected = collect(plan)
        assert collected.removed == ()
        assert all("being written" in item.reason for item in collected.kept)
        assert shard.is_file()
        assert folder.is_dir()


def test_files_of_others_are_listed_and_left_alone(cache: ActivationCache, tmp_path: Path) -> None:
    root, outside = cache.path.parent, tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    foreign = {
        "notes.txt": "notes.txt",
        ".new-ideas/a": ".new-ideas",
        f".new-{'0' * 31}/a": f".new-{'0' * 31}",
        "probes/readme.md": "probes/readme.md",
        "probes/mine/a": "probes/mine",
        "checkpoints/mine/a.bin": "checkpoints/mine",
        ".cfg.json.77.tmp": ".cfg.json.77.tmp",
    }
    for name in foreign:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    (root / "link").symlink_to(outside)
    (root / f".new-{'1' * 32}").symlink_to(outside)
    (cache.path / "moments").mkdir(exist_ok=True)
    (cache.path / "moments" / f".{'0' * 32}.tmp").symlink_to(outside)
    report = measure_disk(root)
    assert {item.name for item in report.of_kind("foreign")} == set(foreign.values())
    assert {item.name for item in report.of_kind("link")} == {"link", f".new-{'1' * 32}"}
    collect(plan_collection(root, list(CATEGORIES), older_than=0.0))
    assert all((root / name).read_text() == "mine" for name in foreign)
    assert (outside / "precious").read_text() == "mine"
    assert (root / "link").is_symlink()
    assert not cache.path.exists()


def test_checkpoints_are_told_apart_and_a_running_fit_keeps_its_own(cache: ActivationCache) -> None:
    root = cache.path.parent
    saved, unsaved = residua.RidgeProbe([0], layers=[1]), residua.RidgeProbe([1], layers=[1])
    residua.save_probe(saved.fit(cache, keep=False), probe_path(root, saved))
    folders = []
    for probe in (saved, unsaved):
        folder = checkpoint_path(root, probe, cache.id)
        assert folder is not None
        Checkpoint(folder / "group", {}).save({"step": 1}, {})
        folders.append(folder)
    (done, open_fit) = folders
    states = {item.name: item.state for item in measure_disk(root).of_kind("checkpoint")}
    assert states == {
        f"checkpoints/{done.name}": "of a fit whose probe is saved",
        f"checkpoints/{open_fit.name}": "an unfinished fit",
    }
    (removal,) = plan_collection(root).removals
    assert removal.item.name == f"checkpoints/{done.name}"
    plan = plan_collection(root, ["leftovers", "checkpoints"])
    assert len(plan.removals) == 2
    with Checkpoint(open_fit / "group", {}).lock():
        (kept,) = plan_collection(root, ["checkpoints"]).kept
        assert kept.reason == "a process works at it"
        collected = collect(plan)
        assert [entry.item.name for entry in collected.removed] == [f"checkpoints/{done.name}"]
        assert Checkpoint(open_fit / "group", {}).load() is not None
    collect(plan)
    assert list((root / "checkpoints").iterdir()) == []


def test_shards_without_a_record_go_only_when_asked_for_and_never_others(
    cache: ActivationCache,
) -> None:
    root = cache.path.parent
    (record,) = cache.path.glob("journal/00000001.json")
    kept = record.read_bytes()
    record.unlink()
    (item,) = measure_disk(root).of_kind("lost part")
    assert item.files == cache.n_blocks + 1
    assert plan_collection(root).removals == ()
    plan = plan_collection(root, ["lost-parts"])
    record.write_bytes(kept)  # its writer came to the record after the plan
    assert collect(plan).removed == ()
    assert residua.verify(cache.path).ok
    record.unlink()
    with lease_part(cache.path / "leases", 1):
        assert measure_disk(root).of_kind("lost part") == []
        assert collect(plan).removed == ()
    assert collect(plan).freed == item.bytes
    assert not list(cache.path.glob("arrays.zarr/residual/*/c/1/0"))
    assert len(list(cache.path.glob("arrays.zarr/residual/1/c/*/0"))) == cache.n_parts - 1


def test_the_last_use_is_the_last_reading_or_change(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache.path.parent
    for path in cache.path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    if not item_of(measure_disk(root), "cache", cache.id).notes_reading:
        pytest.skip("this disk does not note when files are read")
    # What listings read says nothing on the use of a cache.
    now = time.time()
    os.utime(cache.path / "manifest.json", (now, 1e9))
    assert item_of(measure_disk(root), "cache", cache.id).last_used == 1e9
    (kept,) = plan_collection(root, ["unused-caches"], older_than=2 * now).kept
    assert "it was used" in kept.reason
    assert plan_collection(root, ["unused-caches"], older_than=86400.0).removals
    (shard,) = cache.path.glob("arrays.zarr/residual/1/c/1/0")
    os.utime(shard, (now, 1e9))
    assert item_of(measure_disk(root), "cache", cache.id).last_used == pytest.approx(now, abs=1)
    assert plan_collection(root, ["unused-caches"], older_than=86400.0).removals == ()
    monkeypatch.setattr(file_tally, "_notes_reading", lambda root: False)
    assert item_of(measure_disk(root), "cache", cache.id).last_used == 1e9


def test_a_root_that_is_not_there_is_empty(tmp_path: Path) -> None:
    report = measure_disk(tmp_path / "none")
    assert (report.items, report.bytes) == ((), 0)
    assert plan_collection(tmp_path / "none", list(CATEGORIES)).removals == ()


@pytest.mark.slow
def test_leftovers_in_an_object_store_are_found_and_collected(
    tiny_cache: ActivationCache, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.analysis.disk_use import leftovers
    from residua.cache.files import object_leases

    root = as_path(s3_root)
    copy = copy_cache(tiny_cache, root, verify=False).cache
    upload = root / ("0" * 64)
    (upload / "head" / "head.json").write_bytes(b"{}")
    (root / f".probe-{'0' * 32}").write_bytes(b"")
    (root / "notes.txt").write_bytes(b"mine")
    dead = b'{"token": "a", "beats": 1, "pid": 1, "host": "x", "machine": "y"}'
    (copy.path / "leases" / "00000000.4.json").write_bytes(dead)
    monkeypatch.setattr(leftovers, "LEASE_SECONDS", -1.0)
    for module in (object_leases, leftovers):
        monkeypatch.setattr(module, "EXPIRY_SECONDS", 2.0)
    monkeypatch.setattr(object_leases, "BEAT_SECONDS", 0.2)
    item = item_of(measure_disk(root), "cache", copy.id)
    assert item.bytes == item.freed == copy.bytes - len(dead)
    names = {item.name: item.state for item in measure_disk(root).of_kind("leftover")}
    assert names == {
        "0" * 64: "an upload that was stopped",
        f".probe-{'0' * 32}": "a trial of the store",
        f"{copy.id}/leases/00000000.4.json": "a lease of a dead process",
    }
    (removal,) = plan_collection(root).removals  # the others are too young
    assert removal.item.name.endswith("00000000.4.json")
    with object_leases.object_lease(copy.path / "leases", "00000001"):
        collected = collect(plan_collection(root, older_than=0.0))
        reasons = [kept.reason for kept in collected.kept]
        assert len(reasons) == 1
        assert "held by a living process" in reasons[0]
    assert len(collected.removed) == 3
    assert not measure_disk(root).of_kind("leftover")
    assert (root / "notes.txt").read_bytes() == b"mine"
    assert residua.verify(copy.path).ok
    assert collect(plan_collection(root, ["unused-caches"])).freed == item.bytes
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["notes.txt"]
