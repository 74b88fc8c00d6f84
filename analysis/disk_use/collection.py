"""Collection: what may go from a root, by category, and its removal under locks.

`plan_collection` looks, `collect` removes. Between the two anything may happen, so each removal
asks again, once the thing is locked and out of sight: a cache that got a probe, an extending cache,
a job or a pin meanwhile is back, and named among what was left alone.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import InUseError, NotFoundError, ResiduaError, UsageError
from ...cache.files.confined_files import check_folders
from ...cache.files.disk_errors import system_error
from ...cache.files.leases import is_locked
from ...cache.files.paths import is_remote
from ...cache.files.removal import remove_folder
from ...cache.progress import Progress
from ...probes.moments.kept_moments import remove_moments
from ...probes.moments.moment_set import TABLE
from .checkpoint_folders import remove_checkpoint
from .disk_report import SAVED_ALREADY, DiskItem, DiskReport, measure_disk
from .job_folders import ENDED, read_job
from .job_folders import LOCKS as JOB_LOCKS
from .leftovers import remove_leftover, remove_lost_part
from .users import User, check_unused

LEFTOVERS = "leftovers"
CATEGORIES = {
    LEFTOVERS: "left by killed work: unfinished files, stopped copies, checkpoints of saved probes",
    "unused-caches": "caches that no probe, job, pin or kept cache names",
    "checkpoints": "checkpoints of unfinished fits, which the same command would go on from",
    "moments": "moments kept with caches, which the next fit sums again",
    "jobs": "folders of jobs that have ended",
    "lost-parts": "shards that no record names, which `residua repair` may still save",
}
"""Category -> what it holds."""


@dataclass(frozen=True)
class CollectedItem:
    """An item to remove, and why it may go."""

    item: DiskItem
    category: str
    with_items: tuple[DiskItem, ...] = ()
    """What lies in its folder and goes with it: moments, leftovers, lost parts of a cache."""

    @property
    def all_items(self) -> tuple[DiskItem, ...]:
        """The item, and what goes with it."""
        return self.item, *self.with_items


@dataclass(frozen=True)
class KeptItem:
    """An item of a chosen category that stays, and why."""

    item: DiskItem
    category: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """An entry of the JSON object of `residua gc`."""
        kind, name = self.item.key
        return {"kind": kind, "name": name, "category": self.category, "reason": self.reason}


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection would remove."""

    report: DiskReport
    removals: tuple[CollectedItem, ...]
    """In the order of removal: caches after those that extend them."""
    kept: tuple[KeptItem, ...]
    state: Path | None = None
    """A service's own folder, where it lies elsewhere."""

    @property
    def freed(self) -> int:
        """Bytes that go free when all of it goes."""
        return _freed(self.report, self.removals)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua gc --dry-run`."""
        return _describe(self.report, self.removals, self.kept)


@dataclass(frozen=True)
class Collected:
    """What a collection removed."""

    report: DiskReport
    removed: tuple[CollectedItem, ...]
    kept: tuple[KeptItem, ...]
    """What stayed, as planned or because somebody came to need it."""

    @property
    def freed(self) -> int:
        """Bytes that went free."""
        return _freed(self.report, self.removed)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua gc`."""
        return _describe(self.report, self.removed, self.kept)


def _freed(report: DiskReport, removals: Sequence[CollectedItem]) -> int:
    return report.freed_by([item for removal in removals for item in removal.all_items])


def _describe(
    report: DiskReport, removals: Sequence[CollectedItem], kept: Sequence[KeptItem]
) -> dict[str, Any]:
    entries = [
        {"category": removal.category, **item.to_dict()}
        for removal in removals
        for item in removal.all_items
    ]
    return {
        "root": str(report.root),
        "freed": _freed(report, removals),
        "items": entries,
        "kept": [item.to_dict() for item in kept],
    }


def plan_collection(
    root: Path,
    categories: Collection[str] = (LEFTOVERS,),
    older_than: float | None = None,
    state: Path | None = None,
    report: DiskReport | None = None,
) -> CollectionPlan:
    """What of some `categories` under `root` may go.

    `older_than` is a time in seconds: what was used since stays. Without it, a copy or pull that
    can go on stays for a week. `state` is a service's own folder, where it lies elsewhere. Raises
    `UsageError` for an unknown category.
    """
    for category in categories:
        if category not in CATEGORIES:
            raise UsageError(f"no category {category!r}; there are {', '.join(CATEGORIES)}")
    report = measure_disk(root, state) if report is None else report
    removals: list[CollectedItem] = []
    kept: list[KeptItem] = []
    for category in CATEGORIES:
        if category in categories and category != "unused-caches":
            for item in report.items:
                if _category_of(item) != category:
                    continue
                if reason := _reason_to_keep(report, item, older_than):
                    kept.append(KeptItem(item, category, reason))
                else:
                    removals.append(CollectedItem(item, category))
    if "unused-caches" in categories:
        caches, kept_caches = _plan_caches(report, older_than)
        gone = {item.key for removal in caches for item in removal.all_items}
        removals = [removal for removal in removals if removal.item.key not in gone]
        removals += caches
        kept = [item for item in kept if item.item.key not in gone] + kept_caches
    return CollectionPlan(report, tuple(removals), tuple(kept), state)


def possible_savings(report: DiskReport) -> dict[str, int]:
    """Category -> bytes that its collection would free, each alone."""
    return {
        category: plan_collection(report.root, [category], report=report).freed
        for category in CATEGORIES
    }


def _category_of(item: DiskItem) -> str | None:
    """The category of an item; None for what no collection removes."""
    if item.kind == "checkpoint":
        return LEFTOVERS if item.state == SAVED_ALREADY else "checkpoints"
    return {
        "leftover": LEFTOVERS,
        "lost part": "lost-parts",
        "moments": "moments",
        "job": "jobs",
        "cache": "unused-caches",
    }.get(item.kind)


def _reason_to_keep(report: DiskReport, item: DiskItem, older_than: float | None) -> str:
    """Why an item stays; empty for one that may go."""
    if item.in_use:
        return f"it is {item.state}" if item.kind == "job" else "a process works at it"
    if item.kind == "job" and not item.state.endswith(ENDED):
        return "its state cannot be read; remove its folder by hand"
    if item.kind in ("moments", "lost part"):
        cache = item.name.partition("/")[0]
        users = next((c.users for c in report.of_kind("cache") if c.name == cache), ())
        if any(user.kind == "pin" for user in users):
            return "its cache is pinned"
    age = max(0.0, report.time - item.last_used)  # the clock of a store may be ahead
    least = older_than
    if least is None:
        leftover = report.leftovers.get(item.key)
        least = 0.0 if leftover is None else leftover.least_age
    if item.last_used and age < least:
        return f"it was used {format_age(age)} ago"
    return ""


def _plan_caches(
    report: DiskReport, older_than: float | None
) -> tuple[list[CollectedItem], list[KeptItem]]:
    """Caches that may go, and those that stay with the reason.

    A cache that only caches which go extend goes, too: after them.
    """
    inner: dict[str, list[DiskItem]] = {}
    for item in report.of_kind("moments", "lost part", "leftover"):
        inner.setdefault(item.name.partition("/")[0], []).append(item)
    candidates: list[DiskItem] = []
    kept: list[KeptItem] = []
    for cache in report.of_kind("cache"):
        age = report.time - max(
            [cache.last_used, *(i.last_used for i in inner.get(cache.name, ()))]
        )
        if cache.state.startswith("damaged"):
            reason = f"{cache.state[:200]} (residua repair mends it, residua rm removes it)"
        elif others := [user for user in cache.users if user.kind != "cache"]:
            reason = f"named by {_list_users(others)}"
        elif older_than is not None and age < older_than:
            reason = f"it was used {format_age(age)} ago"
        elif cache.state != "complete" and _is_written(report.root / cache.name):
            reason = "a process writes it"
        else:
            candidates.append(cache)
            continue
        kept.append(KeptItem(cache, "unused-caches", reason))
    # Of a chain of caches that extend each other, the last goes first.
    removals: list[CollectedItem] = []
    gone: set[str] = set()
    while True:
        free = [c for c in candidates if all(user.name in gone for user in c.users)]
        if not free:
            break
        for cache in free:
            removals.append(CollectedItem(cache, "unused-caches", tuple(inner.get(cache.name, ()))))
            gone.add(cache.name)
        candidates = [cache for cache in candidates if cache.name not in gone]
    for cache in candidates:
        others = [user for user in cache.users if user.name not in gone]
        kept.append(KeptItem(cache, "unused-caches", f"named by {_list_users(others)}"))
    return removals, kept


def _list_users(users: Sequence[User]) -> str:
    more = f"; and {len(users) - 3} more" if len(users) > 3 else ""
    return "; ".join(str(user) for user in users[:3]) + more


def _is_written(cache: Path) -> bool:
    """Whether a process holds a lock of a part of a cache on disk."""
    if is_remote(cache):
        return False  # a removal asks for the leases
    check_folders(cache, ("leases",))
    return any(is_locked(file) for file in sorted((cache / "leases").glob("*.lock")))


def collect(plan: CollectionPlan, progress: Progress | None = None) -> Collected:
    """Remove what `plan` names, unless somebody needs it now.

    `progress` is called with the number of items done and of all. What another process removed
    meanwhile counts as removed by that one.
    """
    removed: list[CollectedItem] = []
    kept = list(plan.kept)
    for number, removal in enumerate(plan.removals):
        if progress is not None:
            progress(number, len(plan.removals))
        try:
            _remove(plan, removal.item)
            removed.append(removal)
        except NotFoundError:
            kept.append(KeptItem(removal.item, removal.category, "it went meanwhile"))
        except Exception as error:
            reason = error if isinstance(error, ResiduaError) else system_error(error)
            if reason is None and not isinstance(error, OSError):
                raise
            kept.append(KeptItem(removal.item, removal.category, str(reason or error)))
    if progress is not None:
        progress(len(plan.removals), len(plan.removals))
    return Collected(plan.report, tuple(removed), tuple(kept))


def _remove(plan: CollectionPlan, item: DiskItem) -> None:
    """Remove one item under its locks.

    Raises `InUseError` if somebody needs it now, `NotFoundError` if it is not there any more.
    """
    root = plan.report.root
    if item.kind == "leftover":
        remove_leftover(root, plan.report.leftovers[item.key])
    elif item.kind == "lost part":
        leftover = plan.report.leftovers[item.key]
        if not remove_lost_part(root, leftover.cache, leftover.part):
            raise NotFoundError("its shards have a record now")
    elif item.kind == "checkpoint":
        remove_checkpoint(root / item.name)
    elif item.kind == "moments":
        _remove_moments(root, item)
    elif item.kind == "job":
        path = Path(item.name) if item.name.startswith("/") else root / item.name
        remove_job(path)
    else:
        remove_cache(root, item.name, plan.state)


def remove_cache(root: Path, name: str, state: Path | None = None) -> None:
    """Remove the cache in the folder `name` under `root`, unless something names it.

    Asks again once it is out of sight. Raises `InUseError`, also while a process writes it.
    """
    item = "cache", name
    check_unused(root, item, state)
    _remove_existing(root / name, "manifest.json", lambda _: check_unused(root, item, state))


def remove_job(path: Path) -> None:
    """Remove the folder of a job that has ended; raises `InUseError` for one that goes on."""

    def check_ended(folder: Path) -> None:
        job = read_job(folder)
        if not job.has_ended:
            raise InUseError(f"job {path.name} is {job.state}: cancel it first")
        if any(is_locked(folder / name) for name in JOB_LOCKS):
            raise InUseError(f"a service looks after job {path.name} just now")

    check_ended(path)
    _remove_existing(path, "request.json", check_ended)


def _remove_moments(root: Path, item: DiskItem) -> None:
    """Remove a folder of kept moments."""
    cache, folder, name = item.name.split("/")
    check_folders(root / cache, (folder,))
    path = root / item.name
    if is_remote(path):
        remove_moments(path)
        return
    _remove_existing(path, TABLE, lambda _: None)


def _remove_existing(path: Path, marker: str, check: Callable[[Path], None]) -> None:
    """As `remove_folder`; raises `NotFoundError` for a folder that is gone."""
    try:
        remove_folder(path, marker, check)
    except FileNotFoundError as error:
        if isinstance(error, ResiduaError):
            raise
        raise NotFoundError(f"{path} is not there any more") from None


def format_age(seconds: float) -> str:
    """An age for people: `3 days`, `2 hours`, `5 minutes`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} seconds"
