"""Shares caches through dataset repositories of the Hugging Face hub: push and pull."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import CorruptError, IncompleteError, MismatchError, NotFoundError, UsageError
from ..files.json_files import make_folder
from ..files.paths import is_remote
from ..format.journal import Journal
from ..format.manifest import SHORT_ID, Manifest
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.create_cache import FOLDERS, publish
from ..store.verify import verify as verify_cache
from .dataset_card import dataset_card
from .flat_files import check_space, staged_folder
from .hub_errors import check_limits, hub_errors

CARD = "README.md"
CONTENTS = ("manifest.json", "provenance.json", "arrays.zarr/*", "head/*", "journal/*")
"""What is downloaded of a repository; whatever else lies there is left alone."""
"""Called with (stage, done, total); the stage is `verify` (shards)."""


@dataclass(frozen=True)
class PushedCache:
    """What `push` did."""

    repo_id: str
    url: str
    cache: str
    """Id of the cache."""
    files: int
    bytes: int
    card: bool
    """True if the card was written, False if the repository had one."""


@dataclass(frozen=True)
class PulledCache:
    """What `pull` did."""

    cache: ActivationCache
    status: str
    """`pulled`, or `hit` where the cache was there already."""
    commit: str | None
    """Commit of the repository."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua pull`."""
        return {
            "status": self.status,
            "cache": self.cache.id,
            "positions": self.cache.positions,
            "layers": list(self.cache.layers),
            "bytes": self.cache.bytes,
            "commit": self.commit,
            "path": str(self.cache.path),
        }


def push_cache(
    cache: ActivationCache,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    verify: bool = True,
    progress: StageProgress | None = None,
) -> PushedCache:
    """Upload a complete, verified cache to the dataset repository `repo_id`, made if needed.

    An interrupted push goes on where it stopped. A card that is there already stays, so that
    licence and words added by hand survive. Raises `IncompleteError`, `CorruptError`,
    `UsageError` if the hub's limits are passed, all before anything is sent, and `MismatchError`
    if the repository holds another cache.
    """
    if is_remote(cache.path):
        raise UsageError(
            f"{cache.path} lies in an object store; the hub's client sends files of a disk: copy "
            "the folder of the cache to one, and push it from there"
        )
    cache.check_complete()
    names = pushed_files(cache.path)
    size = check_limits(cache.path, names)
    if verify:
        _verify(cache.path, progress)
    where = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision, "token": token}
    with hub_errors(repo_id):
        import huggingface_hub as hub

        url = _create(private, **where)
        _check_remote(cache, where)
        hub.upload_folder(
            folder_path=cache.path,
            commit_message=f"Cache {cache.id[:SHORT_ID]}",
            ignore_patterns=sorted(_others(cache.path, names)),
            **where,
        )
        new = not hub.file_exists(filename=CARD, **where)
        if new:
            data = dataset_card(cache, repo_id).encode()
            hub.upload_file(path_or_fileobj=data, path_in_repo=CARD, **where)
    return PushedCache(repo_id, url, cache.id, len(names), size, new)


def _create(
    private: bool, repo_id: str, repo_type: str, revision: str | None, token: str | None
) -> str:
    """Make the repository and the branch if they are not there; returns the address."""
    import huggingface_hub as hub

    # None, not False: where it is public or not by default, that default holds.
    url = hub.create_repo(
        repo_id, repo_type=repo_type, private=private or None, exist_ok=True, token=token
    )
    if revision is not None:
        hub.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True, token=token)
    return str(url)


def pushed_files(path: Path) -> set[str]:
    """Files that make up a cache: what its journal names, and the journal."""
    journal = Journal(path / "journal")
    tables, files = journal.base()
    shards = {name: set(map(int, numbers)) for name, numbers in tables.items()}
    for number, record in journal.parts().items():
        for name in record.arrays:
            shards.setdefault(name, set()).add(number)
    cache = ActivationCache(path)
    names = set(files)
    for name, numbers in shards.items():
        layout = cache.array(name).layout
        names |= {f"arrays.zarr/{name}/{layout.shard_key(number)}" for number in numbers}
    records = (path / "journal").glob("[!.]*.json")
    return names | {record.relative_to(path).as_posix() for record in records}


def _others(path: Path, names: set[str]) -> Iterator[str]:
    """Files of the folder that are not of the cache: leases, temporary files, dead shards."""
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in names:
            yield name


def _verify(path: Path, progress: StageProgress | None) -> None:
    """Raise `CorruptError` or `IncompleteError` unless every byte is as it was written."""
    stage = None if progress is None else lambda done, total: progress("verify", done, total)
    found = verify_cache(path, stage)
    if not found.ok:
        first = found.damages[0]
        raise CorruptError(
            f"{len(found.damages)} damaged: {first.file}: {first.message}; "
            "`residua verify` names all of them"
        )
    if found.missing_parts:
        raise IncompleteError(f"{len(found.missing_parts)} parts of this cache are missing")


def _check_remote(cache: ActivationCache, where: dict[str, Any]) -> None:
    """Raise `MismatchError` if the repository holds another cache."""
    import huggingface_hub as hub

    if not hub.file_exists(filename="manifest.json", **where):
        return
    found = Manifest.read(Path(hub.hf_hub_download(filename="manifest.json", **where)))
    if found.id != cache.id:
        raise MismatchError(
            f"{where['repo_id']} holds cache {found.id[:SHORT_ID]}, this is "
            f"{cache.id[:SHORT_ID]}; push it to a repository or a --revision of its own"
        )


def pull_cache(
    repo_id: str,
    root: Path,
    *,
    expect: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: StageProgress | None = None,
) -> PulledCache:
    """Download the cache of a dataset repository into `root`, verified before it appears there.

    An interrupted pull goes on where it stopped. With `expect`, the beginning of an id, another
    cache is refused (`MismatchError`). Raises `NotFoundError` if there is no such repository or
    no cache in it, `CorruptError` if a byte is not what was pushed, `NoSpaceError`.
    """
    commit, sizes = _listing(repo_id, revision, token)
    name = hashlib.sha256(f"{repo_id}@{commit}".encode()).hexdigest()[:32]
    with staged_folder(root), ExitStack() as stack:
        place = root
        if is_remote(root):
            place = Path(stack.enter_context(TemporaryDirectory(prefix="residua-")))
        staging = stack.enter_context(_staging(place / f".pull-{name}"))
        fetch = partial(_fetch, repo_id, commit, staging, token)
        fetch(["manifest.json"])
        cache_id = Manifest.read(staging / "manifest.json").id
        if expect is not None and not cache_id.startswith(expect):
            raise MismatchError(
                f"{repo_id} holds cache {cache_id[:SHORT_ID]}, not {expect[:SHORT_ID]}"
            )
        target = root / cache_id
        if (target / "manifest.json").is_file():
            return PulledCache(_existing(target), "hit", commit)
        check_space(place, sum(sizes.values()), "free some, or pull to another --root")
        fetch(list(CONTENTS))
        _admit(staging, target, progress)
    return PulledCache(ActivationCache(target), "pulled", commit)


def _listing(
    repo_id: str, revision: str | None, token: str | None
) -> tuple[str | None, dict[str, int]]:
    """Commit of a repository, and the sizes of the files there that are a cache's."""
    with hub_errors(repo_id):
        import huggingface_hub as hub

        info = hub.dataset_info(repo_id, revision=revision, files_metadata=True, token=token)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = {n: size for n, size in sizes.items() if any(fnmatchcase(n, c) for c in CONTENTS)}
    _check_names(repo_id, wanted)
    return info.sha, wanted


def _fetch(
    repo_id: str, commit: str | None, folder: Path, token: str | None, patterns: list[str]
) -> None:
    """Download what is not in `folder` yet; the client keeps its notes in `.cache/` there."""
    with hub_errors(repo_id):
        import huggingface_hub as hub

        hub.snapshot_download(
            repo_id, repo_type="dataset", revision=commit, local_dir=folder,
            allow_patterns=patterns, token=token,
        )  # fmt: skip


def _check_names(repo_id: str, names: dict[str, int]) -> None:
    """Raise unless there is a cache, and no name leads out of its folder."""
    if "manifest.json" not in names:
        raise NotFoundError(f"{repo_id} is not a cache: it has no manifest.json")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise CorruptError(f"{repo_id} names a file {name!r}, which leads out of the cache")


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder that only this process fills; kept only where an interrupted pull can go on."""
    make_folder(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError("another process is pulling this cache; wait for it") from None
    try:
        yield path
    except (CorruptError, IncompleteError, MismatchError):
        shutil.rmtree(path, ignore_errors=True)
        raise
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _existing(target: Path) -> ActivationCache:
    cache = ActivationCache(target)
    if not cache.complete:
        raise IncompleteError(
            f"cache {cache.id[:SHORT_ID]} is under this root and unfinished; finish it with the "
            f"`residua extract` that began it, or remove {target} and pull again"
        )
    return cache


def _admit(staging: Path, target: Path, progress: StageProgress | None) -> None:
    """Verify what was downloaded, drop what is not of the cache, and give it its name."""
    _verify(staging, progress)
    ActivationCache(staging).check_complete()
    for name in list(_others(staging, pushed_files(staging))):
        (staging / name).unlink()
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    for folder in FOLDERS:
        (staging / folder).mkdir(exist_ok=True)
    publish(staging, target)
