"""Leases in an object store: one holder, signs of life, and what happens without them."""

import json
import threading
import time
import uuid
from pathlib import Path

import pytest

from residua.cache.errors import LeaseLostError
from residua.cache.files import object_leases
from residua.cache.files.leases import hold_lock, lease_holder, lease_part
from residua.cache.files.object_leases import ObjectLease
from residua.cache.files.paths import as_path, list_folder, write_object


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The leases of a cache; they live for half a second."""
    monkeypatch.setattr(object_leases, "EXPIRY_SECONDS", 0.5)
    monkeypatch.setattr(object_leases, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(object_leases, "TRUST_SECONDS", 0.2)
    return as_path(f"memory://leases/{uuid.uuid4().hex}")


def write_foreign_lease(folder: Path, part: int, generation: int = 1, **more: object) -> Path:
    """The lease of a holder on another machine, who gives no sign of life."""
    path = folder / f"{part:08d}.{generation}.json"
    holder = {"token": uuid.uuid4().hex, "beats": 3, "pid": 1, "host": "afar", "machine": "other"}
    write_object(path, json.dumps({**holder, **more}).encode())
    return path


def can_lease(folder: Path, part: int) -> bool:
    with lease_part(folder, part) as lease:
        return lease is not None


def test_a_lease_is_held_by_one_and_free_again_afterwards(folder: Path) -> None:
    with lease_part(folder, 3) as lease:
        assert lease
        lease.check()
        assert not can_lease(folder, 3)
        assert can_lease(folder, 4)
        assert lease_holder(folder, 3).startswith("process ")
    assert can_lease(folder, 3)
    assert list_folder(folder) == []


def test_a_holder_with_signs_of_life_keeps_its_lease(folder: Path) -> None:
    with lease_part(folder, 0) as lease:
        assert lease
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert not can_lease(folder, 0)
            time.sleep(0.05)
        lease.check()


def test_a_silent_holder_is_replaced_only_after_its_time(folder: Path) -> None:
    write_foreign_lease(folder, 0)
    began = time.monotonic()
    while not can_lease(folder, 0):
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    assert time.monotonic() - began >= 0.5
    assert list_folder(folder) == []


def test_a_sign_of_life_begins_the_time_anew(folder: Path) -> None:
    write_foreign_lease(folder, 0)
    for beats in range(6):
        assert not can_lease(folder, 0)
        time.sleep(0.2)
        write_foreign_lease(folder, 0, beats=beats)


def test_a_dead_process_of_this_machine_is_replaced_at_once(folder: Path) -> None:
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_foreign_lease(folder, 0, pid=child.pid, machine=object_leases._this_process()["machine"])
    assert can_lease(folder, 0)


def test_who_was_replaced_finds_out_and_disturbs_nobody(folder: Path) -> None:
    replaced_lease = ObjectLease(folder, "00000000", 1)
    write_object(replaced_lease.path, replaced_lease.signature())
    time.sleep(0.3)  # it is no longer sure
    write_foreign_lease(folder, 0, generation=2)
    with pytest.raises(LeaseLostError, match="took 00000000"):
        replaced_lease.check()
    replaced_lease.release()
    assert [path.name for path in list_folder(folder)] == ["00000000.2.json"]


def test_who_lost_its_object_finds_out(folder: Path) -> None:
    with lease_part(folder, 0) as lease:
        assert isinstance(lease, ObjectLease)
        lease._ended.set()
        lease.path.unlink()
        with pytest.raises(LeaseLostError):
            lease.check()


def test_what_was_seen_dead_but_is_held_anew_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the taking, the dead lease was released and another one taken."""
    write_foreign_lease(folder, 0)
    monkeypatch.setattr(
        object_leases, "_is_dead", lambda path, holder: write_foreign_lease(folder, 0) is not None
    )
    assert not can_lease(folder, 0)
    assert [path.name for path in list_folder(folder)] == ["00000000.1.json"]


def test_a_lease_that_is_no_json_expires(folder: Path) -> None:
    write_object(folder / "00000000.1.json", b"\xff")
    assert not can_lease(folder, 0)
    time.sleep(0.6)
    assert can_lease(folder, 0)


def test_exclusive_waits_for_the_holder(folder: Path) -> None:
    order = []

    def second() -> None:
        with hold_lock(folder, "layers"):
            order.append("second")

    with hold_lock(folder, "layers"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
