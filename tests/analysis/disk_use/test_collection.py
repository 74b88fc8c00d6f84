"""Collection takes nothing that a probe, an extending cache, a job, a pin or a fit still names."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.analysis.disk_use import collection
from residua.analysis.disk_use.collection import (
    CATEGORIES,
    CollectionPlan,
    collect,
    format_age,
    plan_collection,
    remove_job,
)
from residua.analysis.disk_use.disk_report import measure_disk
from residua.analysis.disk_use.job_folders import list_jobs
from residua.analysis.disk_use.pins import list_pins, pin_saved, unpin_saved
from residua.analysis.disk_use.users import users_of
from residua.cache.errors import CorruptError, InUseError, NotFoundError, UsageError
from residua.cache.files import removal
from residua.cache.files.json_files import read_json, write_json
from residua.cache.files.leases import lease_part
from residua.cache.files.paths import as_path
from residua.cache.sharing.root_transfer import copy_cache
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import checkpoint_path, probe_path
from residua.probes.training.checkpoint import Checkpoint


@pytest.fixture
def cache(tiny_cache: ActivationCache, tmp_path: Path) -> ActivationCache:
    """A copy of `tiny_cache` under a root of its own."""
    without_moments = shutil.ignore_patterns("moments")
    shutil.copytree(tiny_cache.path, tmp_path / "root" / tiny_cache.id, ignore=without_moments)
    return ActivationCache(tmp_path / "root" / tiny_cache.id)


def save_ridge(cache: ActivationCache) -> Path:
    """Fit and save a small probe under the root of `cache`; its folder."""
    probe = residua.RidgeProbe([0], layers=[1]).fit(cache, keep=False)
    return residua.save_probe(probe, probe_path(cache.path.parent, probe))


def write_job(
    root: Path, name: str, state: str | None, command: str = "fit ridge", **arguments: Any
) -> Path:
    """A job of a service of `root`, as its queue writes it; its folder."""
    folder = root / ".service" / "jobs" / name
    folder.mkdir(parents=True)
    request = {"command": command, "arguments": arguments}
    (folder / "request.json").write_text(json.dumps(request))
    if state is not None:
        (folder / "state.json").write_text(json.dumps({"state": state}))
    return folder


def plan_caches(root: Path) -> CollectionPlan:
    return plan_collection(root, ["unused-caches"])


def only_reason(root: Path) -> str:
    """Why the only cache of `root` stays."""
    plan = plan_caches(root)
    assert plan.removals == ()
    return plan.kept[0].reason


def test_an_unused_cache_goes_with_its_moments(cache: ActivationCache) -> None:
    root = cache.path.parent
    residua.RidgeProbe([0], layers=[1]).fit(cache, keep=True)
    report = measure_disk(root)
    plan = plan_caches(root)
    assert [item.kind for item in plan.removals[0].all_items] == ["cache", "moments"]
    assert plan.freed == report.bytes
    assert collect(plan).freed == report.bytes
    assert list(root.iterdir()) == []


def test_a_probe_keeps_its_cache_even_if_it_is_damaged(cache: ActivationCache) -> None:
    root, probe = cache.path.parent, save_ridge(cache)
    assert f"probe {probe.name}" in only_reason(root)
    (probe / "config.json").write_text("{")
    assert f"probe {probe.name}" in only_reason(root)
    shutil.rmtree(probe)
    assert len(plan_caches(root).removals) == 1


def test_a_chain_of_caches_is_kept_by_its_end_and_goes_from_there(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = {"root": tmp_path, "context": 64, "part_positions": 512}
    chain = [
        residua.extract(model_folder, texts_file, max_tokens=tokens, **options)
        for tokens in (1024, 2048, 4096)
    ]
    users = {name: [user.name for user in found] for (_, name), found in users_of(tmp_path).items()}
    assert users == {chain[0].id: [chain[1].id], chain[1].id: [chain[2].id]}
    (path,) = [save_ridge(chain[2])]
    plan = plan_caches(tmp_path)
    assert plan.removals == ()
    assert {entry.item.name for entry in plan.kept} == {cache.id for cache in chain}
    shutil.rmtree(path)
    plan = plan_caches(tmp_path)
    assert [removal.item.name for removal in plan.removals] == [c.id for c in reversed(chain)]
    pin_saved(tmp_path, "cache", chain[1].id)
    (removal_of_last,) = plan_caches(tmp_path).removals
    assert removal_of_last.item.name == chain[2].id
    # The pin came after the plan: the last goes, the other two stay.
    collected = collect(plan)
    assert [entry.item.name for entry in collected.removed] == [chain[2].id]
    assert collected.freed == removal_of_last.item.freed
    assert all(residua.verify(cache.path).ok for cache in chain[:2])


@pytest.mark.parametrize("user", ["probe", "pin", "job", "fit", "extending cache"])
def test_a_cache_that_is_named_between_plan_and_removal_stays(
    user: str, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the last moment: while the cache is locked and out of sight."""
    root = cache.path.parent
    probe = save_ridge(cache)
    hidden = root.parent / "hidden"
    probe.rename(hidden)
    checkpoint = checkpoint_path(root, residua.RidgeProbe([0]), cache.id)
    assert checkpoint is not None
    other = root / ("0" * 64)
    shutil.copytree(cache.path, other)
    manifest = read_json(other / "manifest.json")
    manifest["extra"]["extends"] = cache.id
    manifest["identity"]["tokens"]["seed"] = 77
    plan = plan_caches(root)
    shutil.move(other, root.parent / "extending")
    rename, lock = os.rename, Checkpoint(checkpoint, {}).lock()

    def come(source: Path, target: Path) -> None:
        """Rename, as removal does, then name the cache."""
        rename(source, target)
        if Path(source) != cache.path:
            return
        if user == "probe":
            rename(hidden, probe)
        elif user == "pin":
            file = root / ".pins" / f"{cache.id}.json"
            file.parent.mkdir()
            write_json(file, {"kind": "cache", "name": cache.id, "reason": "mine", "pinned": 1.0})
        elif user == "job":
            write_job(root, "1", "running", cache=cache.id)
        elif user == "fit":
            lock.__enter__()
        else:
            from residua.cache.files.json_files import json_digest

            manifest["id"] = json_digest(manifest["identity"])
            (root.parent / "extending" / "manifest.json").unlink()
            write_json(root.parent / "extending" / "manifest.json", manifest)
            rename(root.parent / "extending", root / manifest["id"])

    monkeypatch.setattr(removal.os, "rename", come)
    collected = collect(plan)
    monkeypatch.undo()
    if user == "fit":
        lock.__exit__(None, None, None)
    reasons = {entry.item.name: entry.reason for entry in collected.kept}
    assert "still named by" in reasons[cache.id]
    assert user.rpartition(" ")[2] in reasons[cache.id]
    assert cache.id not in [entry.item.name for entry in collected.removed]
    assert residua.verify(cache.path).ok
    assert not list(root.glob(".rm-*"))


def test_two_collections_at_once_remove_each_thing_once(cache: ActivationCache) -> None:
    root = cache.path.parent
    for number in range(20):
        (root / f".new-{number:032x}").mkdir()
        (root / f".new-{number:032x}" / "rows").write_bytes(b"rows")
    plans = [plan_collection(root, ["leftovers", "unused-caches"]) for _ in range(2)]
    results: list[collection.Collected] = []
    threads = [threading.Thread(target=lambda p=plan: results.append(collect(p))) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert list(root.iterdir()) == []
    removals = [entry.item.name for result in results for entry in result.removed]
    assert removals.count(cache.id) <= 1


def test_a_reader_that_has_opened_a_cache_reads_on(cache: ActivationCache) -> None:
    path = cache.path / "arrays.zarr/residual/1/c/0/0"
    content = path.read_bytes()
    with open(path, "rb") as shard:
        assert shard.read(16) == content[:16]
        collect(plan_caches(cache.path.parent))
        assert not cache.path.exists()
        assert shard.read() == content[16:]


def test_a_cache_that_is_being_written_stays(cache: ActivationCache) -> None:
    root = cache.path.parent
    with lease_part(cache.path / "leases", 1):
        (kept,) = collect(plan_caches(root)).kept
        assert "is being written by process" in kept.reason
    (cache.path / "journal" / "00000001.json").unlink()
    with lease_part(cache.path / "leases", 1):
        assert only_reason(root) == "a process writes it"
    assert len(plan_caches(root).removals) == 1


def test_damaged_caches_are_not_collected(cache: ActivationCache) -> None:
    root = cache.path.parent
    manifest = cache.path / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_text("{")
    assert "residua repair" in only_reason(root)
    manifest.unlink()
    assert "its manifest is lost" in only_reason(root)
    manifest.write_bytes(content)
    assert residua.verify(cache.path).ok


def test_jobs_that_go_on_keep_what_they_name(cache: ActivationCache) -> None:
    root, probe = cache.path.parent, save_ridge(cache)
    waiting = write_job(
        root, "0001", None, "evaluate", cache=str(cache.path), probes=[f"{probe.name[:12]},bigram"]
    )
    users = users_of(root)
    assert [user.kind for user in users["cache", cache.id]] == ["probe", "job"]
    assert [str(user) for user in users["probe", probe.name]] == ["job 0001 (evaluate, queued)"]
    plan = plan_collection(root, list(CATEGORIES))
    assert plan.removals == ()
    assert {entry.item.kind for entry in plan.kept} == {"job", "cache"}
    (waiting / "state.json").write_text('{"state": "done"}')
    ended = write_job(root, "0002", "failed", cache=cache.id)
    assert [user.kind for user in users_of(root)["cache", cache.id]] == ["probe"]
    plan = plan_collection(root, ["jobs"])
    assert {removal.item.name for removal in plan.removals} == {
        ".service/jobs/0001",
        ".service/jobs/0002",
    }
    (ended / "state.json").write_text('{"state": "queued"}')  # asked for again meanwhile
    collected = collect(plan)
    assert [entry.item.name for entry in collected.removed] == [".service/jobs/0001"]
    assert "job 0002 is queued" in collected.kept[-1].reason
    with pytest.raises(InUseError):
        remove_job(ended)


def test_an_extraction_that_waits_keeps_unfinished_caches(cache: ActivationCache) -> None:
    root = cache.path.parent
    write_job(root, "1", "queued", "extract", model="m", data="texts.txt")
    assert len(plan_caches(root).removals) == 1
    (cache.path / "journal" / "00000001.json").unlink()
    assert "job 1 (extract, queued)" in only_reason(root)


def test_jobs_of_a_service_with_its_own_folder_count(
    cache: ActivationCache, tmp_path: Path
) -> None:
    root, state = cache.path.parent, tmp_path / "state"
    job = write_job(root, "1", "running", cache=cache.id[:5])
    state.mkdir()
    shutil.move(root / ".service" / "jobs", state / "jobs")
    job = state / "jobs" / job.name
    assert len(plan_caches(root).removals) == 1
    plan = plan_collection(root, ["unused-caches", "jobs"], state=state)
    assert plan.removals == ()
    (job / "state.json").write_text('{"state": "cancelled"}')
    assert len(collect(plan_collection(root, ["jobs"], state=state)).removed) == 1
    assert not job.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"command": 3, "arguments": 7}', b"{" * 100_000, b"\xff", b'{"state": []}'],
)
def test_forged_jobs_and_pins_break_nothing(content: bytes, cache: ActivationCache) -> None:
    root = cache.path.parent
    job = write_job(root, "1", None)
    (job / "request.json").write_bytes(content)
    (job / "state.json").write_bytes(content)
    (root / ".pins").mkdir()
    (root / ".pins" / f"{cache.id}.json").write_bytes(content)
    (root / ".pins" / "..json").write_bytes(content)
    (found,) = list_jobs(root)
    assert found.state == "unknown"
    assert "a pin that cannot be read" in only_reason(root)
    plan = plan_collection(root, ["jobs"])
    assert "cannot be read" in plan.kept[0].reason
    assert measure_disk(root).of_kind("job")[0].state == "unknown"
    unpin_saved(root, cache.id)
    assert len(plan_caches(root).removals) == 1


def test_links_under_the_names_of_pins_and_jobs_are_not_followed(
    cache: ActivationCache, tmp_path: Path
) -> None:
    root, outside = cache.path.parent, tmp_path / "outside"
    outside.mkdir()
    pin_saved(root, "cache", cache.id, "here")
    shutil.move(root / ".pins", outside / "pins")
    (root / ".pins").symlink_to(outside / "pins")
    assert list_pins(root) == []
    with pytest.raises(CorruptError):
        pin_saved(root, "cache", cache.id)
    job = write_job(root, "1", "done")
    shutil.move(job, outside / "job")
    (root / ".service" / "jobs" / "1").symlink_to(outside / "job")
    collect(plan_collection(root, list(CATEGORIES)))
    assert (outside / "job" / "state.json").is_file()


def test_pins_are_kept_listed_and_taken_away(cache: ActivationCache) -> None:
    root, probe = cache.path.parent, save_ridge(cache)
    pin = pin_saved(root, "cache", cache.id, "figures of the paper")
    assert list_pins(root) == [pin]
    pin_saved(root, "probe", probe.name)
    assert [entry.name for entry in list_pins(root)] == sorted([cache.id, probe.name])
    assert "a pin (figures of the paper)" in only_reason(root)
    with pytest.raises(NotFoundError, match="is not, or no longer, a probe"):
        pin_saved(root, "probe", "other")
    with pytest.raises(UsageError, match="is no name"):
        pin_saved(root, "cache", "../outside")
    with pytest.raises(UsageError, match="at most|the most is 500"):
        pin_saved(root, "cache", cache.id, "x" * 501)
    assert unpin_saved(root, cache.id[:6]).name == cache.id
    with pytest.raises(NotFoundError, match="no pin"):
        unpin_saved(root, cache.id)


def test_moments_of_a_pinned_cache_stay(cache: ActivationCache) -> None:
    root = cache.path.parent
    residua.RidgeProbe([0], layers=[1]).fit(cache, keep=True)
    pin_saved(root, "cache", cache.id)
    assert plan_collection(root, ["moments"]).kept[0].reason == "its cache is pinned"
    unpin_saved(root, cache.id)
    collect(plan_collection(root, ["moments"]))
    assert list((cache.path / "moments").iterdir()) == []
    assert residua.verify(cache.path).ok


def test_pins_and_users_in_an_object_store(tiny_cache: ActivationCache, s3_root: str) -> None:
    root = as_path(s3_root)
    copy = copy_cache(tiny_cache, root, verify=False).cache
    pin = pin_saved(root, "cache", copy.id, "shared")
    assert list_pins(root) == [pin]
    assert "a pin (shared)" in only_reason(root)
    unpin_saved(root, copy.id)
    probe = residua.RidgeProbe([0], layers=[1]).fit(copy, keep=False)
    path = residua.save_probe(probe, probe_path(root, probe))
    assert f"probe {path.name}" in only_reason(root)


def test_an_unknown_category_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unused-caches"):
        plan_collection(tmp_path, ["caches"])


def test_ages_are_written_in_the_unit_that_fits() -> None:
    assert [format_age(n) for n in (3, 300, 8000, 300_000)] == [
        "3 seconds",
        "5 minutes",
        "2 hours",
        "3 days",
    ]
