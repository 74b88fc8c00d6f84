"""Leases in an object store, which has no locks: objects that are created once, and expire.

The lease `00000007` is the object `leases/00000007.<n>.json` with the largest n. Who wants it
creates the next n, which only one can, once the holder's object is gone or has not changed for
`EXPIRY` seconds of the watcher's own clock; the holder changes it every `BEAT`. A holder that
was stopped for long finds that there is a larger n, or that it cannot know, and gives up its part.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LeaseLostError
from .paths import create_object, list_folder, write_object

EXPIRY = 30.0
"""Seconds without a sign of life after which a lease may be taken over."""
BEAT = EXPIRY / 6
"""Seconds between two signs of life."""
SURE = EXPIRY / 2
"""Seconds after its last sign of life for which a holder need not look."""


@dataclass
class ObjectLease:
    """A lease that this process holds, until it says otherwise or is found out to be dead."""

    folder: Path
    name: str
    generation: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _beats: int = 0
    _seen: float = field(default_factory=lambda: _now())
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        return _path(self.folder, self.name, self.generation)

    def signature(self) -> bytes:
        """What the object says now: who holds it, and a number that grows."""
        who = {"token": self.token, "beats": self._beats, **_myself()}
        return json.dumps(who, allow_nan=False).encode()

    def check(self) -> None:
        """Raise `LeaseLostError` unless this process still holds the lease."""
        if _now() - self._seen < SURE and not self._ended.is_set():
            return
        found = _generations(self.folder, self.name)
        top = max(found, default=0)
        if top != self.generation or _token(_read(found[top])) != self.token:
            raise LeaseLostError(
                f"another worker took {self.path.name} over, as this one gave no sign of life for "
                f"{EXPIRY:.0f} seconds"
            )
        self._seen = _now()

    def keep(self) -> None:
        """Give signs of life until `release`; run by a thread."""
        while not self._ended.wait(BEAT):
            before = _now()
            with suppress(Exception):  # a store that does not answer is found out by `check`
                self.check()
                self._beats += 1
                write_object(self.path, self.signature())
                self._seen = before

    def release(self) -> None:
        """Let others have it at once; what dead holders left goes too."""
        with suppress(Exception):  # else it expires
            for generation, path in sorted(_generations(self.folder, self.name).items()):
                if generation < self.generation:
                    path.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """Remove this holder's own object, and no other."""
        self._ended.set()
        with suppress(Exception):
            if _token(_read(self.path)) == self.token:
                self.path.unlink(missing_ok=True)


@contextmanager
def object_lease(folder: Path, name: str) -> Iterator[ObjectLease | None]:
    """Hold the lease `name` within the context; yields None if another worker has it."""
    held = _acquire(folder, name)
    if held is None:
        yield None
        return
    beat = threading.Thread(target=held.keep, daemon=True, name=f"lease {name}")
    beat.start()
    try:
        yield held
    finally:
        held.release()
        beat.join()


def _acquire(folder: Path, name: str) -> ObjectLease | None:
    found = _generations(folder, name)
    top = max(found, default=0)
    before = _read(found[top]) if top else None
    if before is not None and not _is_dead(found[top], before):
        return None
    lease = ObjectLease(folder, name, top + 1)
    try:
        create_object(lease.path, lease.signature())
    except FileExistsError:
        return None
    # What was seen as dead may have been released and taken anew before ours was made.
    now = _generations(folder, name)
    stale = top and (top not in now or _token(_read(now[top])) != _token(before))
    if max(now, default=0) != lease.generation or stale:
        lease.drop()
        return None
    return lease


def object_lease_holder(folder: Path, name: str) -> str:
    """Who holds the lease `name`, such as `process 12 on host`."""
    found = _generations(folder, name)
    who = _read(found[max(found)]) if found else None
    return f"process {who['pid']} on {who['host']}" if who else "another process"


_watched: dict[str, tuple[Any, float]] = {}
"""Leases of others: what their objects said last, and since when, by this process's clock."""


def _is_dead(path: Path, said: dict[str, Any]) -> bool:
    """Whether the holder is a dead process of this machine, or silent for too long."""
    mine = _myself()
    if said.get("machine") == mine["machine"] and said.get("machine"):
        try:
            os.kill(int(said["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            pass
    state = said.get("token"), said.get("beats")
    known, since = _watched.get(str(path), (None, 0.0))
    if known != state:
        _watched[str(path)] = state, _now()
        return False
    return _now() - since > EXPIRY


def _myself() -> dict[str, Any]:
    """This process; `machine` differs after a restart and between containers."""
    machine = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine}


def _generations(folder: Path, name: str) -> dict[int, Path]:
    """The objects of the lease `name` by their n."""
    found = {}
    for path in list_folder(folder):
        if match := re.fullmatch(re.escape(name) + r"\.(\d+)\.json", path.name):
            found[int(match[1])] = path
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """What a lease object says; None if it is gone, nothing of use if it is not ours."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _now() -> float:
    """Seconds of a clock that goes on while the machine sleeps, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _token(said: dict[str, Any] | None) -> Any:
    return (said or {}).get("token")


def _path(folder: Path, name: str, generation: int) -> Path:
    return folder / f"{name}.{generation}.json"
