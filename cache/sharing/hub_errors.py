"""Limits of the Hugging Face hub, and errors of its client as errors of this package.

Push and pull of caches and of probes run inside `translate_hub_errors`; `push_cache` calls
`check_limits` before the first upload.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import LimitError, NoSpaceError, NotFoundError, ResiduaError, UsageError
from ..files.disk_errors import system_error

MAX_FILES = 100_000
"""Files of one repository. This limit and the next two: the hub's storage page, 2025."""
MAX_ENTRIES = 10_000
"""Entries of one folder."""
MAX_FILE_BYTES = 50 * 10**9
"""Bytes of one file."""


def check_limits(path: Path, names: set[str]) -> int:
    """Total bytes of the files `names` in the folder `path`.

    Raises `UsageError` if the files are beyond a limit of the hub.
    """
    sizes = {name: (path / name).stat().st_size for name in names}
    if len(names) > MAX_FILES:
        raise UsageError(
            f"this cache has {len(names):,} files, the hub takes {MAX_FILES:,} per repository; "
            "extract it with larger --part-positions"
        )

    # (folder, entry) pairs of all files and folders: which folder has the most entries?
    entries = {(str(p.parent), p.name) for name in names for p in _with_parents(name)}
    folder, count = Counter(folder for folder, _ in entries).most_common(1)[0]
    if count > MAX_ENTRIES:
        raise UsageError(
            f"the folder {folder} has {count:,} entries, the hub takes {MAX_ENTRIES:,}; "
            "extract it with larger --part-positions"
        )

    largest = max(names, key=lambda name: sizes[name])
    if sizes[largest] > MAX_FILE_BYTES:
        raise UsageError(
            f"{largest} has {sizes[largest] / 1e9:.0f} GB, the hub takes "
            f"{MAX_FILE_BYTES / 1e9:.0f} GB per file; extract it with smaller --part-positions"
        )
    return sum(sizes.values())


def _with_parents(name: str) -> list[PurePosixPath]:
    """The path `name` and the folders above, without the root."""
    path = PurePosixPath(name)
    return [path, *path.parents][:-1]


@contextmanager
def translate_hub_errors(repo_id: str, kind: str = "dataset") -> Iterator[None]:
    """Turn errors of the hub's client into errors of this package.

    `kind` is the type of the repository `repo_id`: `dataset` or `model`. Raises `NotFoundError`,
    `UsageError`, `NoSpaceError`, or `ResiduaError` if the hub cannot be reached; other errors pass.
    """
    from huggingface_hub import errors as hub

    try:
        yield
    except ResiduaError:
        raise
    except hub.RepositoryNotFoundError:
        raise NotFoundError(
            f"there is no {kind} repository {repo_id!r} on the hub that this login can see; "
            "check the name, or log in with `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise NotFoundError(f"{repo_id} has no such revision") from None
    except (hub.HFValidationError, hub.LocalTokenNotFoundError) as error:
        raise UsageError(f"{error}") from None
    except hub.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        hint = "; log in with `hf auth login` and a token that may write" * (code in (401, 403))
        raise UsageError(f"the hub refused: {str(error).splitlines()[0]}{hint}") from None
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        translated = system_error(error)
        if isinstance(translated, NoSpaceError):
            raise NoSpaceError("the disk is full; what is there stays for the next try") from None
        if isinstance(translated, LimitError):
            raise translated from None
        is_offline = isinstance(error, ConnectionError | TimeoutError | hub.LocalEntryNotFoundError)
        if is_offline or library.startswith(("httpx", "requests")):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ResiduaError(
                f"the hub cannot be reached: {reason}; the same command goes on from here"
            ) from None
        raise
