"""Pushes caches to dataset repositories of the Hugging Face hub, and pulls caches from there.

`push_cache` and `pull_cache` are the public functions (`residua push`, `residua pull`). The card of
a repository: `dataset_card.py`; limits and errors of the hub: `hub_errors.py`.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CorruptError, IncompleteError, MismatchError, NotFoundError, UsageError
from ..files.paths import is_remote
from ..files.staging import resumable_staging_folder, sweep_staging, temporary_folder
from ..format.journal import Journal
from ..format.manifest import SHORT_ID, Manifest
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.cache_creation import CACHE_FOLDERS, publish_cache
from ..store.verification import verify as verify_cache
from .dataset_card import format_dataset_card
from .flat_files import check_space, write_errors
from .hub_errors import check_limits, translate_hub_errors

CARD = "README.md"
CONTENTS = ("manifest.json", "provenance.json", "arrays.zarr/*", "head/*", "journal/*")
"""Patterns of the files of a cache; other files of a repository are not downloaded."""
PULL_SECONDS = 7 * 24 * 3600.0
"""Age at which an interrupted pull is given up, and its folder removed by the next pull."""


@dataclass(frozen=True)
class PushedCache:
    """Result of `push_cache`."""

    repo_id: str
    url: str
    cache: str
    """Id of the cache."""
    files: int
    bytes: int
    card: bool
    """True if the card was written, False if the repository had a card."""


@dataclass(frozen=True)
class PulledCache:
    """Result of `pull_cache`."""

    cache: ActivationCache
    status: str
    """`pulled`, `copied`, or `hit` if the cache was under the root already."""
    commit: str | None
    """Commit of the repository; None for a copy by path."""

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
    """Upload a complete, verified cache to the dataset repository `repo_id`, created if needed.

    `private=False` leaves the visibility to the default of the account. `verify=False` skips the
    check of every byte. `progress("verify", done, total)` counts shards.

    An interrupted push goes on where it stopped. An existing card stays, so that a licence and
    words added by hand survive. Raises `IncompleteError`, `CorruptError`, or `UsageError` for a
    cache beyond the hub's limits, all before the first upload, and `MismatchError` if the
    repository holds another cache.
    """
    if is_remote(cache.path):
        raise UsageError(
            f"{cache.path} lies in an object store; the hub's client sends files of a disk: copy "
            "the folder of the cache to one, and push it from there"
        )
    cache.check_complete()
    names = cache_files(cache.path)
    n_bytes = check_limits(cache.path, names)
    if verify:
        check_bytes(cache.path, progress)
    repository = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision, "token": token}
    with translate_hub_errors(repo_id):
        import huggingface_hub as hub

        url = _create_repository(private, **repository)
        _check_repository(cache, repository)
        hub.upload_folder(
            folder_path=cache.path,
            commit_message=f"Cache {cache.id[:SHORT_ID]}",
            ignore_patterns=sorted(_other_files(cache.path, names)),
            **repository,
        )
        lacks_card = not hub.file_exists(filename=CARD, **repository)
        if lacks_card:
            card = format_dataset_card(cache, repo_id).encode()
            hub.upload_file(path_or_fileobj=card, path_in_repo=CARD, **repository)
    return PushedCache(repo_id, url, cache.id, len(names), n_bytes, card=lacks_card)


def _create_repository(
    private: bool, repo_id: str, repo_type: str, revision: str | None, token: str | None
) -> str:
    """Create the repository and the branch, unless they exist; returns the repository's URL."""
    import huggingface_hub as hub

    # None, not False: an organisation may make new repositories private by default.
    url = hub.create_repo(
        repo_id, repo_type=repo_type, private=private or None, exist_ok=True, token=token
    )
    if revision is not None:
        hub.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True, token=token)
    return str(url)


def cache_files(path: Path) -> set[str]:
    """Names of the files of a cache: the files that its journal names, and the journal's own."""
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


def _other_files(path: Path, names: set[str]) -> Iterator[str]:
    """Files in the folder `path` beside `names`: leases, temporary files, uncommitted shards."""
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in names:
            yield name


def check_bytes(path: Path, progress: StageProgress | None) -> None:
    """Raise `CorruptError` or `IncompleteError` unless every byte is as it was written."""
    stage = None if progress is None else lambda done, total: progress("verify", done, total)
    verification = verify_cache(path, stage)
    # Moments are not sent; a layer that is not finished is no damage.
    damages = [damage for damage in verification.damages if not damage.file.startswith("moments")]
    if damages:
        raise CorruptError(
            f"{len(damages)} damaged: {damages[0].file}: {damages[0].message}; "
            "`residua verify` names all of them"
        )
    if verification.missing_parts and not ActivationCache(path).complete:
        raise IncompleteError(f"{len(verification.missing_parts)} parts of this cache are missing")


def _check_repository(cache: ActivationCache, repository: dict[str, Any]) -> None:
    """Raise `MismatchError` if the repository holds another cache."""
    import huggingface_hub as hub

    if not hub.file_exists(filename="manifest.json", **repository):
        return
    manifest = Manifest.read(Path(hub.hf_hub_download(filename="manifest.json", **repository)))
    if manifest.id != cache.id:
        raise MismatchError(
            f"{repository['repo_id']} holds cache {manifest.id[:SHORT_ID]}, this is "
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
    """Download the cache of a dataset repository into `root`; the cache is verified first.

    `expect` is the beginning of an id: a cache with another id raises `MismatchError`.
    `progress("verify", done, total)` counts shards.

    An interrupted pull goes on where it stopped. Raises `NotFoundError` if no such repository
    exists or the repository has no cache, `CorruptError` if a byte is not as it was pushed,
    `NoSpaceError`, and `UsageError` while another process pulls the same commit.
    """
    commit, sizes = _list_cache_files(repo_id, revision, token)
    with write_errors(root), ExitStack() as stack:
        # Files are downloaded to a disk; a root in an object store gets them afterwards.
        parent = root
        if is_remote(root):
            parent = stack.enter_context(temporary_folder())
        staging = stack.enter_context(_staging_folder(parent, repo_id, commit))

        def download(patterns: list[str]) -> None:
            """Download the files that match `patterns`, unless `staging` has them."""
            with translate_hub_errors(repo_id):
                import huggingface_hub as hub

                hub.snapshot_download(
                    repo_id,
                    repo_type="dataset",
                    revision=commit,
                    local_dir=staging,
                    allow_patterns=patterns,
                    token=token,
                )

        # The manifest has the id: is this cache expected, and is it under the root already?
        download(["manifest.json"])
        cache_id = Manifest.read(staging / "manifest.json").id
        if expect is not None and not cache_id.startswith(expect):
            raise MismatchError(
                f"{repo_id} holds cache {cache_id[:SHORT_ID]}, not {expect[:SHORT_ID]}"
            )
        target = root / cache_id
        if (target / "manifest.json").is_file():
            return PulledCache(open_complete(target), "hit", commit)

        check_space(parent, sum(sizes.values()), "free some, or pull to another --root")
        download(list(CONTENTS))
        check_bytes(staging, progress)
        ActivationCache(staging).check_complete()
        _tidy(staging)
        publish_cache(staging, target)
    return PulledCache(ActivationCache(target), "pulled", commit)


def _list_cache_files(
    repo_id: str, revision: str | None, token: str | None
) -> tuple[str | None, dict[str, int]]:
    """Commit of a repository, and file name -> bytes of its files that belong to a cache."""
    with translate_hub_errors(repo_id):
        import huggingface_hub as hub

        info = hub.dataset_info(repo_id, revision=revision, files_metadata=True, token=token)
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if any(fnmatchcase(file.rfilename, pattern) for pattern in CONTENTS)
    }
    _check_names(repo_id, sizes)
    return info.sha, sizes


def _check_names(repo_id: str, names: dict[str, int]) -> None:
    """Raise `NotFoundError` without a manifest, `CorruptError` for a name outside the folder."""
    if "manifest.json" not in names:
        raise NotFoundError(f"{repo_id} is not a cache: it has no manifest.json")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise CorruptError(f"{repo_id} names a file {name!r}, which leads out of the cache")


@contextmanager
def _staging_folder(parent: Path, repo_id: str, commit: str | None) -> Iterator[Path]:
    """The staging folder of a commit in `parent`; a later pull goes on in the same folder.

    What is wrong with the repository itself would be wrong again: then the folder is removed.
    """
    sweep_staging(parent, ".pull-*", unused_seconds=PULL_SECONDS)
    name = hashlib.sha256(f"{repo_id}@{commit}".encode()).hexdigest()[:32]
    discard_on = (CorruptError, IncompleteError, MismatchError)
    with ExitStack() as stack:
        folder = resumable_staging_folder(parent / f".pull-{name}", discard_on)
        try:
            staging = stack.enter_context(folder)
        except BlockingIOError:
            raise UsageError("another process is pulling this cache; wait for it") from None
        yield staging


def open_complete(target: Path) -> ActivationCache:
    """The cache in the folder `target`; raises `IncompleteError` if it is not complete."""
    cache = ActivationCache(target)
    if not cache.complete:
        raise IncompleteError(
            f"cache {cache.id[:SHORT_ID]} is under this root and unfinished; finish it with the "
            f"`residua extract` that began it, or remove {target} and pull again"
        )
    return cache


def _tidy(staging: Path) -> None:
    """Remove all files that the journal does not name, and create the folders of a cache."""
    for name in list(_other_files(staging, cache_files(staging))):
        (staging / name).unlink()
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # notes of the hub's client
    for folder in CACHE_FOLDERS:
        (staging / folder).mkdir(exist_ok=True)
