"""Leases in an object store, which has no locks: objects that are created once, and expire.

Protocol. The lease `00000007` of a part is the object `leases/00000007.<n>.json` with the largest
generation n. `leases.py` calls `object_lease` for remote caches.

- *Taking.* A worker creates generation n + 1 by conditional creation, which succeeds for one worker
  alone, if no generation exists or the holder of generation n is dead. The worker then lists the
  generations again, and withdraws if its own is not the largest or the holder taken for dead has
  changed meanwhile.
- *Living.* The holder rewrites its object every `BEAT_SECONDS` with a growing number of beats.
- *Dying.* A holder is dead if its process on this machine has ended, or if its object has not
  changed for `EXPIRY_SECONDS` by the watcher's own clock; clocks are never compared.
- *Losing.* Before every commit the holder calls `check`. If the last beat is older than
  `TRUST_SECONDS`, or the lease ended, `check` looks for a larger generation and raises
  `LeaseLostError`.
- *Releasing.* The holder removes smaller generations, then its own object.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LeaseLostError
from .paths import create_object, list_folder, write_object

EXPIRY_SECONDS = 30.0
"""Time without a beat after which another worker may take a lease over."""
BEAT_SECONDS = EXPIRY_SECONDS / 6
"""Time between two beats of a holder."""
TRUST_SECONDS = EXPIRY_SECONDS / 2
"""Time after its last beat for which a holder trusts that it still has the lease."""


@contextmanager
def object_lease(folder: Path, name: str) -> Iterator["ObjectLease | None"]:
    """Hold the lease `name` within the context; yields None if another worker has the lease."""
    lease = _acquire(folder, name)
    if lease is None:
        yield None
        return
    beats = threading.Thread(target=lease.keep_alive, daemon=True, name=f"lease {name}")
    beats.start()
    try:
        yield lease
    finally:
        lease.release()
        beats.join()


def object_lease_holder(folder: Path, name: str) -> str:
    """Process and host of the holder of the lease `name`, such as `process 12 on host`."""
    generations = _generations(folder, name)
    holder = _read_object(generations[max(generations)]) if generations else None
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def held_object_leases(folder: Path, parts: Collection[int]) -> dict[int, str]:
    """Part -> holder of those of `parts` that have a lease; the holder may have died."""
    names = {path.name.partition(".")[0] for path in list_folder(folder)}
    named = {part: f"{part:08d}" for part in parts}
    return {part: object_lease_holder(folder, n) for part, n in named.items() if n in names}


@dataclass
class ObjectLease:
    """A lease of this process, held until its release, or until a takeover after the expiry."""

    folder: Path
    name: str
    generation: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random name of this holder."""
    _beats: int = 0
    _last_proof: float = field(default_factory=lambda: _now())
    """Time at which the lease was certainly held."""
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        """The object of this generation."""
        return self.folder / f"{self.name}.{self.generation}.json"

    def signature(self) -> bytes:
        """Content of the object: token, number of beats, process and machine of the holder."""
        content = {"token": self.token, "beats": self._beats, **_this_process()}
        return json.dumps(content, allow_nan=False).encode()

    def check(self) -> None:
        """Raise `LeaseLostError` unless this process still holds the lease."""
        if _now() - self._last_proof < TRUST_SECONDS and not self._ended.is_set():
            return
        generations = _generations(self.folder, self.name)
        largest = max(generations, default=0)
        is_holder = (
            largest == self.generation
            and _token_of(_read_object(generations[largest])) == self.token
        )
        if not is_holder:
            raise LeaseLostError(
                f"another worker took {self.path.name} over, as this one gave no sign of life for "
                f"{EXPIRY_SECONDS:.0f} seconds"
            )
        self._last_proof = _now()

    def keep_alive(self) -> None:
        """Write a beat every `BEAT_SECONDS` until the release; runs in a thread."""
        while not self._ended.wait(BEAT_SECONDS):
            before = _now()
            with suppress(Exception):  # if the store does not answer, `check` will notice
                self.check()
                self._beats += 1
                write_object(self.path, self.signature())
                self._last_proof = before

    def release(self) -> None:
        """Free the lease at once; objects of dead holders are removed too."""
        with suppress(Exception):  # an object that cannot be removed expires
            for generation, path in sorted(_generations(self.folder, self.name).items()):
                if generation < self.generation:
                    path.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """End the beats and remove this holder's object, unless another holder replaced it."""
        self._ended.set()
        with suppress(Exception):
            if _token_of(_read_object(self.path)) == self.token:
                self.path.unlink(missing_ok=True)


def _acquire(folder: Path, name: str) -> ObjectLease | None:
    """Take the lease `name`; None if another worker has it or is faster."""
    # Look: is the largest generation alive?
    generations = _generations(folder, name)
    largest = max(generations, default=0)
    holder = _read_object(generations[largest]) if largest else None
    if holder is not None and not _is_dead(generations[largest], holder):
        return None

    # Take: only one worker can create the next generation.
    lease = ObjectLease(folder, name, largest + 1)
    try:
        create_object(lease.path, lease.signature())
    except FileExistsError:
        return None

    # Look again: the dead lease may have been released and taken anew before ours was created.
    generations = _generations(folder, name)
    has_changed = largest and (
        largest not in generations
        or _token_of(_read_object(generations[largest])) != _token_of(holder)
    )
    if max(generations, default=0) != lease.generation or has_changed:
        lease.drop()
        return None
    return lease


_last_changes: dict[str, tuple[Any, float]] = {}
"""Path of another worker's lease object -> its last content, and when this process first saw it."""


def _is_dead(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder of the lease object `path` has ended or was silent for too long."""
    # A process of this machine can be asked for directly.
    this_process = _this_process()
    if holder.get("machine") == this_process["machine"] and holder.get("machine"):
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            pass
    # Of others, measure how long the object has not changed.
    content = holder.get("token"), holder.get("beats")
    last_content, since = _last_changes.get(str(path), (None, 0.0))
    if last_content != content:
        _last_changes[str(path)] = content, _now()
        return False
    return _now() - since > EXPIRY_SECONDS


def _this_process() -> dict[str, Any]:
    """Process id, host and machine; `machine` differs after a restart and between containers."""
    machine = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine}


def _generations(folder: Path, name: str) -> dict[int, Path]:
    """Generation n -> object, for the lease `name`."""
    generations = {}
    for path in list_folder(folder):
        if match := re.fullmatch(re.escape(name) + r"\.(\d+)\.json", path.name):
            generations[int(match[1])] = path
    return generations


def _read_object(path: Path) -> dict[str, Any] | None:
    """Content of a lease object; None if the object is gone, empty if it is not a lease."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _token_of(content: dict[str, Any] | None) -> Any:
    """Token in the content of a lease object; None without."""
    return (content or {}).get("token")


def _now() -> float:
    """Seconds of a clock that also runs while the machine sleeps, if the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
