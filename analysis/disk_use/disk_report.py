"""What lies under a root: `measure_disk` gives every cache, probe and leftover with its bytes.

Each file belongs to one item. Of files with several names (caches that extend or copy another),
an item's `freed` counts only what goes free when the item goes alone.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.files.paths import check_not_served, is_remote
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import UNREADABLE, list_paths
from ...probes.moments.kept_moments import FOLDER as MOMENTS
from ...probes.moments.moment_set import TABLE
from ...probes.saved.library import CHECKPOINTS
from ...probes.saved.library import FOLDER as PROBES
from ...probes.saved.probe_list import probe_folders
from .checkpoint_folders import is_checkpoint, is_fit_running
from .file_tally import FileTally, FoundFile, ItemKey, walk_files
from .job_folders import JOB_NAME, JOBS, STATE_FOLDERS, job_places, list_jobs
from .leftovers import (
    CACHE_ID,
    SHARD,
    Leftover,
    interrupted_upload,
    is_in_use,
    leftover_of,
    lost_part,
)
from .pins import FOLDER as PINS
from .users import User, users_of

KINDS = (
    "cache",
    "moments",
    "lost part",
    "probe",
    "checkpoint",
    "job",
    "service",
    "pins",
    "leftover",
    "link",
    "foreign",
)
"""Kinds of items, in the order of reports."""


@dataclass(frozen=True)
class DiskItem:
    """Something under a root that is kept or removed as a whole."""

    kind: str
    """One of `KINDS`."""
    name: str
    """Id of a cache, name of a probe, else the path below the root."""
    files: int
    """Number of files or objects."""
    bytes: int
    """Bytes of its files; one with several names in it counts once."""
    freed: int
    """Bytes that go free when this item goes alone."""
    state: str = ""
    """Such as `complete`, `12 of 40 parts`, what a leftover is, the state of a job."""
    last_used: float = 0.0
    """Time of the last reading or change, in seconds since 1970; 0 if unknown."""
    notes_reading: bool = False
    """Whether the disk notes when files are read (to a day); else only changes count."""
    users: tuple[User, ...] = ()
    """What names a cache or probe."""
    in_use: bool = False
    """Whether a process works at a leftover or checkpoint."""
    contents: dict[str, int] = field(default_factory=dict)
    """Of a cache, bytes by content: `residual`, `logits`, `other`."""

    @property
    def key(self) -> ItemKey:
        """Kind and name."""
        return self.kind, self.name

    def to_dict(self) -> dict[str, Any]:
        """An entry of the JSON object of `residua du`."""
        return {
            "kind": self.kind,
            "name": self.name,
            "files": self.files,
            "bytes": self.bytes,
            "freed": self.freed,
            "shared": self.bytes - self.freed,
            "state": self.state,
            "last_used": self.last_used or None,
            "notes_reading": self.notes_reading,
            "in_use": self.in_use,
            "named_by": [user.to_dict() for user in self.users],
            "contents": self.contents or None,
        }


@dataclass(frozen=True)
class DiskReport:
    """All items under a root."""

    root: Path
    items: tuple[DiskItem, ...]
    """By kind, the largest first."""
    bytes: int
    """Bytes of all files; one with several names counts once."""
    unreadable: tuple[str, ...]
    """Folders that could not be looked into."""
    tally: FileTally = field(repr=False, compare=False)
    """Files by item, to ask what any set of items frees."""
    leftovers: dict[ItemKey, Leftover] = field(repr=False, compare=False, default_factory=dict)
    """Leftovers and lost parts by their item."""
    time: float = 0.0
    """When it was measured, in seconds since 1970."""

    def of_kind(self, *kinds: str) -> list[DiskItem]:
        """The items of some kinds."""
        return [item for item in self.items if item.kind in kinds]

    def freed_by(self, items: Collection[DiskItem]) -> int:
        """Bytes that go free when all `items` go."""
        return self.tally.freed_by([item.key for item in items])

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua du`, without what collection would free."""
        return {
            "root": str(self.root),
            "bytes": self.bytes,
            "items": [item.to_dict() for item in self.items],
            "unreadable": list(self.unreadable),
        }


def measure_disk(root: Path, state: Path | None = None) -> DiskReport:
    """Look at everything under `root`; `state` is a service's own folder, where it lies elsewhere.

    Opens manifests, journals and configurations, never a shard or tensor. A root that is not there
    gives an empty report.
    """
    check_not_served(root, "its disk is its own: ask it by --server instead of --root")
    survey = _Survey(root, state)
    unreadable: list[str] = []
    for file in walk_files(root, unreadable.append):
        survey.add(file)
    for place in job_places(root, state)[0 if is_remote(root) else len(STATE_FOLDERS) :]:
        # A service's own folder outside the root: its jobs are items by their whole path.
        for file in walk_files(place, unreadable.append):
            job = file.name.partition("/")[0]
            kind = "job" if JOB_NAME.fullmatch(job) else "service"
            survey.tally.add((kind, str(place / job)), file)
    keys = list(survey.tally.items)
    return DiskReport(
        root,
        tuple(survey.items()),
        survey.tally.bytes_of(keys),
        tuple(sorted(unreadable)),
        tally=survey.tally,
        leftovers=survey.leftovers,
        time=survey.now,
    )


class _Survey:
    """Tells what each file under a root belongs to, and what is known of the items."""

    def __init__(self, root: Path, state: Path | None) -> None:
        self.root, self.state = root, state
        self.now = time.time()
        self.remote = is_remote(root)
        self.tally = FileTally()
        self.leftovers: dict[ItemKey, Leftover] = {}
        self.users = users_of(root, state)
        self._caches = {path.name: _CacheSummary(path) for path in list_paths(root)}
        self._probes = {path.name for path in probe_folders(root)}
        self._checkpoints: dict[str, bool] = {}
        self._moments: dict[str, bool] = {}
        self._contents: dict[str, dict[str, int]] = {}
        self._whole_uploads: dict[str, bool] = {}

    def add(self, file: FoundFile) -> None:
        """Count a file of the root; an empty folder counts as part of a leftover alone."""
        if file.is_folder:
            if leftover := leftover_of(file.name.split("/"), self.remote):
                self.tally.add(self._leftover(leftover), file)
            return
        is_content = not file.name.endswith(".json")
        self.tally.add(self._item_of(file), file, is_content)

    def _item_of(self, file: FoundFile) -> ItemKey:
        """The item of a file, by its path."""
        parts = file.name.split("/")
        top = parts[0]
        if file.is_link and len(parts) == 1:
            return "link", top
        if top in (PROBES, CHECKPOINTS, PINS, *STATE_FOLDERS) or top.startswith("."):
            return self._hidden_or_known(parts)
        if top in self._caches:
            return self._item_in_cache(top, parts, file)
        if self.remote and CACHE_ID.fullmatch(top):
            return self._leftover(interrupted_upload(top))
        if CACHE_ID.fullmatch(top) and self._has_journal(top):
            return "cache", top
        return "foreign", top

    def _hidden_or_known(self, parts: list[str]) -> ItemKey:
        """The item of a file in the folders of probes, checkpoints, pins, jobs; or hidden."""
        top = parts[0]
        if leftover := leftover_of(parts, self.remote):
            return self._leftover(leftover)
        inner = parts[1] if len(parts) > 1 else ""
        if top == PROBES:
            known = len(parts) > 2 and inner in self._probes
            return ("probe", inner) if known else ("foreign", "/".join(parts[:2]))
        if top == CHECKPOINTS and len(parts) > 2:
            if inner not in self._checkpoints:
                self._checkpoints[inner] = is_checkpoint(self.root / top / inner)
            kind = "checkpoint" if self._checkpoints[inner] else "foreign"
            return kind, f"{top}/{inner}"
        if top == PINS:
            return "pins", PINS
        if top in STATE_FOLDERS:
            is_job = inner == JOBS and len(parts) > 3 and JOB_NAME.fullmatch(parts[2])
            return ("job", "/".join(parts[:3])) if is_job else ("service", top)
        return "foreign", "/".join(parts[:2]) if top == CHECKPOINTS else top

    def _item_in_cache(self, top: str, parts: list[str], file: FoundFile) -> ItemKey:
        """The item of a file in the folder of a cache."""
        leftover = leftover_of(parts, self.remote)
        is_fresh_lease = (
            leftover is not None
            and leftover.guard == "lease"
            and self.now - file.written <= leftover.least_age
        )
        if leftover is not None and not is_fresh_lease:
            return self._leftover(leftover)
        if len(parts) > 3 and parts[1] == MOMENTS:
            folder = "/".join(parts[:3])
            if folder not in self._moments:
                self._moments[folder] = (self.root / folder / TABLE).is_file()
            if self._moments[folder]:
                return "moments", folder
        content = "other"
        if len(parts) > 3 and parts[1] == "arrays.zarr":
            content = parts[2] if parts[2] in ("residual", "logits") else "other"
            if match := SHARD.fullmatch("/".join(parts[2:])):
                array, part = match[1], int(match[2])
                if not self.remote and self._caches[top].lacks_record(array, part):
                    left = lost_part(top, part)
                    if ("lost part", left.name) in self.leftovers or not is_in_use(
                        self.root, left, self.now
                    ):
                        self.leftovers["lost part", left.name] = left
                        return "lost part", left.name
        contents = self._contents.setdefault(top, {"residual": 0, "logits": 0, "other": 0})
        contents[content] += file.bytes
        return "cache", top

    def _leftover(self, leftover: Leftover) -> ItemKey:
        """Remember a leftover; its item."""
        key = "leftover", leftover.name
        self.leftovers[key] = leftover
        return key

    def _has_journal(self, name: str) -> bool:
        """Whether a folder is a cache that has lost its manifest."""
        if name not in self._whole_uploads:
            self._whole_uploads[name] = (self.root / name / "journal" / "base.json").is_file()
        return self._whole_uploads[name]

    def items(self) -> list[DiskItem]:
        """All items, by kind, the largest first."""
        jobs = {job.path: job for job in list_jobs(self.root, self.state)}
        items = []
        for (kind, name), total in self.tally.items.items():
            facts: dict[str, Any] = {}
            if kind in ("cache", "probe"):
                facts["users"] = tuple(self.users.get((kind, name), ()))
            if kind == "cache":
                summary = self._caches.get(name)
                facts["state"] = "damaged: its manifest is lost" if not summary else summary.state
                facts["contents"] = self._contents.get(name, {})
            elif kind in ("leftover", "lost part"):
                leftover = self.leftovers[kind, name]
                facts["state"] = leftover.what
                facts["in_use"] = is_in_use(self.root, leftover, self.now)
            elif kind == "checkpoint":
                facts |= self._describe_checkpoint(name)
            elif kind == "job":
                job = jobs.get(Path(name) if name.startswith("/") else self.root / name)
                facts["state"] = "unknown" if job is None else f"{job.command} {job.state}".strip()
                facts["in_use"] = job is not None and job.state in ("queued", "running")
            items.append(
                DiskItem(
                    kind,
                    name,
                    total.files,
                    self.tally.bytes_of([(kind, name)]),
                    self.tally.freed_by([(kind, name)]),
                    last_used=max(total.written, total.read or 0.0),
                    notes_reading=total.read is not None,
                    **facts,
                )
            )
        return sorted(items, key=lambda item: (KINDS.index(item.kind), -item.bytes, item.name))

    def _describe_checkpoint(self, name: str) -> dict[str, Any]:
        """State of a checkpoint, and whether a fit works there."""
        probe = name.partition("/")[2]
        if is_fit_running(self.root / name):
            return {"state": "a fit that runs", "in_use": True}
        if probe in self._probes:
            return {"state": SAVED_ALREADY}
        ids = [summary.id[:12] for summary in self._caches.values()]
        if any(f"-{cache_id}" in probe for cache_id in ids):
            return {"state": "an unfinished fit"}
        return {"state": "an unfinished fit of a cache that is not under this root"}


SAVED_ALREADY = "of a fit whose probe is saved"
"""State of a checkpoint that no fit goes on from."""


class _CacheSummary:
    """State of a cache, and the arrays that the records of its parts name."""

    def __init__(self, path: Path) -> None:
        self.id = path.name
        self._records: dict[int, set[str]] | None = None
        try:
            cache = ActivationCache(path)
            self.id = cache.id
            self._records = {part: set(r.arrays) for part, r in cache.committed.items()}
            parts = f"{len(cache.committed)} of {cache.n_parts} parts"
            self.state = "complete" if cache.complete else parts
        except UNREADABLE as error:
            self.state = f"damaged: {error or type(error).__name__}"

    def lacks_record(self, array: str, part: int) -> bool:
        """Whether no record names the shard of `part` of `array`; False for a damaged journal."""
        return self._records is not None and array not in self._records.get(part, ())
