"""Steps of `residua info`, `rm`, `pin`, `push` and `pull`: caches and probes by name or path."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import InUseError, NotFoundError, UsageError
from ...cache.files.paths import as_path
from ...cache.files.removal import exclusive_bytes, remove_folder
from ...cache.format.manifest import SHORT_ID
from ...cache.progress import StageProgress
from ...cache.sharing.hub import pull_cache, push_cache
from ...cache.sharing.root_transfer import copy_cache
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import find_path, list_paths
from ...probes.saved.hub import pull_probe_into, push_probe
from ...probes.saved.library import FOLDER as PROBES_FOLDER
from ...probes.saved.library import find_probe
from ...probes.saved.probe_files import copy_probe, remove_probe
from ...probes.saved.probe_list import is_probe
from ..disk_use.pins import Pin, pin_saved
from ..disk_use.users import ItemName, User, blocking_users, refusal

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""USER/NAME of a repository of the hub."""


@dataclass(frozen=True)
class SavedItem:
    """A cache or a saved probe, found by its name or path."""

    kind: str
    """`cache` or `probe`."""
    path: Path

    @property
    def key(self) -> ItemName:
        """Kind and name of the folder."""
        return self.kind, self.path.name

    @property
    def root(self) -> Path:
        """The root under which it lies."""
        return self.path.parent.parent if self.kind == "probe" else self.path.parent


def find_saved(name: str, root: Path) -> SavedItem:
    """The cache or the probe called `name`: a path, a prefix of an id, or of a probe's name.

    Raises `NotFoundError` if there is neither, `UsageError` if a prefix is that of several.
    """
    if is_probe(as_path(name)):
        return SavedItem("probe", as_path(name))
    try:
        return SavedItem("cache", find_path(name, root))
    except NotFoundError as no_cache:
        try:
            return SavedItem("probe", find_probe(name, root))
        except NotFoundError as no_probe:
            raise NotFoundError(f"{no_cache}; and {no_probe}") from None


def is_hub_id(target: str) -> bool:
    """Whether `target` is USER/NAME on the hub, and no folder that exists here."""
    return HUB_ID.fullmatch(target) is not None and not Path(target).exists()


@dataclass(frozen=True)
class Removal:
    """A cache or probe to remove, with what the removal frees."""

    item: SavedItem
    freed: int
    """Bytes that no other folder links."""
    shared: int
    """Bytes that other caches link, and keep."""
    users: tuple[User, ...]
    """What names it, beside what is removed together with it."""
    ignored: tuple[ItemName, ...] = ()
    """Caches and probes that are removed together with it."""
    state: Path | None = None
    """A service's own folder, where it lies outside the root."""

    @property
    def extended_by(self) -> list[str]:
        """Ids of the caches under the same root that extend this one."""
        return [user.name for user in self.users if user.kind == "cache"]

    def to_dict(self) -> dict[str, Any]:
        """An entry of the JSON object of `residua rm`."""
        return {
            "kind": self.item.kind,
            "path": str(self.item.path),
            "freed": self.freed,
            "shared": self.shared,
            "extended_by": self.extended_by,
            "named_by": [user.to_dict() for user in self.users],
        }


def plan_removals(
    names: Sequence[str], root: Path, force: bool = False, state: Path | None = None
) -> list[Removal]:
    """What `residua rm` would remove; every name must be that of a cache or probe.

    Raises `InUseError` for one that a probe, an extending cache, a job or a pin names, unless
    `force`, or unless that goes, too. `state` is a service's own folder, where it lies elsewhere.
    """
    items = list(dict.fromkeys(find_saved(name, root) for name in names))
    together = tuple(item.key for item in items)
    removals = []
    for item in items:
        users = blocking_users(item.root, item.key, state, together)
        if users and not force:
            raise InUseError(refusal(item.key, users))
        freed, shared = exclusive_bytes(item.path)
        removals.append(Removal(item, freed, shared, tuple(users), together, state))
    return removals


def remove_saved(removal: Removal, force: bool = False) -> None:
    """Remove the cache or probe.

    Raises `InUseError` while another process writes it, and, unless `force`, if something came to
    name it meanwhile.
    """
    item = removal.item

    def check(_: Path) -> None:
        users = blocking_users(item.root, item.key, removal.state, removal.ignored)
        if users and not force:
            raise InUseError(refusal(item.key, users))

    if item.kind == "probe":
        remove_probe(item.path, check)
    else:
        remove_folder(item.path, "manifest.json", check)


def pin_item(name: str, root: Path, reason: str) -> Pin:
    """Pin the cache or probe called `name`.

    Raises `UsageError` for a probe that lies outside the folder of probes of a root.
    """
    item = find_saved(name, root)
    if item.kind == "probe" and item.path.parent.name != PROBES_FOLDER:
        raise UsageError(
            f"{item.path} is a probe outside a root, which `residua gc` never sees; only what lies "
            "under a root can be pinned"
        )
    return pin_saved(item.root, item.kind, item.path.name, reason)


def push_saved(
    name: str,
    target: str,
    root: Path,
    progress: StageProgress,
    *,
    private: bool = False,
    revision: str | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Push a cache or probe to the hub, or copy it to another root; the JSON object of the push."""
    item = find_saved(name, root)
    if is_hub_id(target):
        if item.kind == "cache":
            pushed = push_cache(
                ActivationCache(item.path),
                target,
                private=private,
                revision=revision,
                verify=verify,
                progress=progress,
            )
            return {"status": "pushed", "kind": "cache", **vars(pushed)}
        url = push_probe(item.path, target, private=private, revision=revision)
        return {"status": "pushed", "kind": "probe", "url": url, "probe": item.path.name}
    if private or revision is not None:
        raise UsageError(
            f"--private and --revision are for the hub (USER/NAME); {target} is taken for a root"
        )
    return _copy(item, as_path(target), verify, progress)


def pull_saved(
    source: str,
    root: Path,
    progress: StageProgress,
    *,
    kind: str | None = None,
    expect: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Pull a cache or probe from the hub, or copy one from a path; the JSON object.

    `kind` is `cache` or `probe` for a name that both a dataset and a model repository have; by
    default the cache is taken, and the probe where there is no such cache.
    """
    path = as_path(source)
    if is_hub_id(source) and not _is_beside_a_root(path):
        return _pull_from_hub(source, root, progress, kind, expect=expect, revision=revision)
    for name, value in {"--revision": revision, "--kind": kind}.items():
        if value is not None:
            raise UsageError(f"{name} is for the hub (USER/NAME); {source} is taken for a path")
    return _copy(_find_at(path), root, True, progress, expect)


def _pull_from_hub(
    repo_id: str,
    root: Path,
    progress: StageProgress,
    kind: str | None,
    *,
    expect: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """Pull the cache or probe of a repository; the JSON object."""
    no_cache = None
    if kind != "probe":
        try:
            pulled = pull_cache(repo_id, root, expect=expect, revision=revision, progress=progress)
            return {"kind": "cache", **pulled.to_dict()}
        except NotFoundError as error:
            if kind == "cache":
                raise
            no_cache = error
    try:
        path, status = pull_probe_into(repo_id, root, expect=expect, revision=revision)
    except NotFoundError as no_probe:
        if no_cache is None:
            raise
        raise NotFoundError(f"{no_cache}; and {no_probe}") from None
    return {"status": status, "kind": "probe", "probe": path.name, "path": str(path)}


def _find_at(path: Path) -> SavedItem:
    """The cache or probe at `path`, whose last part may be the beginning of its name."""
    if not path.is_dir():
        return find_saved(path.name, _root_of(path))
    try:
        return find_saved(str(path), _root_of(path))
    except NotFoundError:
        ids = ", ".join(folder.name[:SHORT_ID] for folder in list_paths(path)) or "no caches"
        raise NotFoundError(
            f"{path} is neither a cache nor a probe; name one in it, such as {path}/3f2a (it has: "
            f"{ids})"
        ) from None


def _is_beside_a_root(path: Path) -> bool:
    """Whether the folder above `path` has a cache or probe whose name begins like its last part."""
    try:
        find_saved(path.name, _root_of(path))
    except NotFoundError:
        return False
    except UsageError:  # several do
        return True
    return True


def _root_of(path: Path) -> Path:
    """Root of the cache or probe at `path`, whose last part may be a prefix of its name."""
    return path.parent.parent if path.parent.name == PROBES_FOLDER else path.parent


def _copy(
    item: SavedItem, root: Path, verify: bool, progress: StageProgress, expect: str | None = None
) -> dict[str, Any]:
    """Copy `item` to `root`; the JSON object."""
    if item.kind == "probe":
        path, status = copy_probe(item.path, root, expect=expect)
        return {"status": status, "kind": "probe", "probe": path.name, "path": str(path)}
    cache = ActivationCache(item.path)
    copied = copy_cache(cache, root, expect=expect, verify=verify, progress=progress)
    return {"kind": "cache", **copied.to_dict()}
