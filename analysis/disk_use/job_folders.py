"""Folders of the service's jobs, as far as disk use needs them: state, command, names in arguments.

A job is `<state>/jobs/<id>/` with `request.json` and `state.json`; the service writes them. Both
are untrusted here. A job that is queued or running names the caches and probes in its arguments.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import CorruptError, ResiduaError
from ...cache.files.confined_files import check_folders, read_confined
from ...cache.files.json_fields import parse_json_object
from ...cache.files.paths import is_remote, list_folder

STATE_FOLDERS = (".service", ".jobs")
"""Folders under a root in which a service keeps its own files."""
JOBS = "jobs"
"""Folder of the jobs in such a folder."""
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
"""Names of the folders of jobs."""
LOCKS = ("owner.lock", "attempt.lock")
"""Files in a job's folder that a service, or the job's process, has locked while it works at it."""
ENDED = ("done", "failed", "cancelled")
"""States of a job that does not go on by itself."""
MAX_JOB_BYTES = 4 << 20
"""Largest request or state of a job that is read."""
MAX_NAMES = 10_000
"""Most texts in the arguments of a job that are compared with names."""


@dataclass(frozen=True)
class JobOnDisk:
    """A job on disk."""

    path: Path
    state: str
    """`queued`, `running`, `done`, `failed`, `cancelled`; `unknown` if it cannot be read."""
    command: str
    """Such as `fit ridge`; empty if it cannot be read."""
    arguments: tuple[str, ...]
    """All texts in its arguments."""

    @property
    def has_ended(self) -> bool:
        """Whether the job does not go on by itself."""
        return self.state in ENDED

    def names(self, name: str, least: int = 3) -> bool:
        """Whether an argument is a beginning of `name`, of `least` letters or more, or its path."""
        last_parts = (text.rstrip("/").rpartition("/")[2] for text in self.arguments)
        return any(len(part) >= least and name.startswith(part) for part in last_parts)


def job_places(root: Path, state: Path | None = None) -> list[Path]:
    """Folders that hold jobs of services of `root`; `state` is a service's own folder elsewhere."""
    folders = [] if is_remote(root) else [root / name for name in STATE_FOLDERS]
    if state is not None and state not in folders:
        folders.append(state)
    return [folder / JOBS for folder in folders]


def list_jobs(root: Path, state: Path | None = None) -> Iterator[JobOnDisk]:
    """The jobs of services of `root`, whatever their state."""
    for place in job_places(root, state):
        try:
            check_folders(place.parent.parent, (place.parent.name,))
            check_folders(place.parent, (JOBS,))
        except CorruptError:
            continue
        for path in sorted(list_folder(place)):
            if JOB_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield read_job(path)


def read_job(path: Path) -> JobOnDisk:
    """The job in the folder `path`."""
    request, state = (_read_object(path, name) for name in ("request.json", "state.json"))
    command, word = request.get("command"), state.get("state")
    if word is None and isinstance(command, str):
        word = "queued"  # its maker has not come to the state yet
    return JobOnDisk(
        path,
        word if isinstance(word, str) and word in ("queued", "running", *ENDED) else "unknown",
        command[:200] if isinstance(command, str) else "",
        tuple(_texts(request.get("arguments"))),
    )


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a job; empty if it cannot be read."""
    try:
        return parse_json_object(read_confined(folder, name, MAX_JOB_BYTES), folder / name)
    except (ResiduaError, OSError, ValueError, json.JSONDecodeError):
        return {}


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value, the keys of objects left out."""
    texts: list[str] = []
    todo = [value]
    while todo and len(texts) < MAX_NAMES:
        item = todo.pop()
        if isinstance(item, str):
            texts += re.split(r"[,\s]+", item) if len(item) < 4096 else []
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    return texts
