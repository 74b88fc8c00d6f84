"""What the Hugging Face hub takes, and what its client raises, in this package's words."""

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import NoSpaceError, NotFoundError, ResiduaError, UsageError

MAX_FILES = 100_000
"""Files of one repository, and below, the hub's other limits (its storage page, 2025)."""
MAX_ENTRIES = 10_000
"""Entries of one folder."""
MAX_FILE_BYTES = 50 * 10**9


def check_limits(path: Path, names: set[str]) -> int:
    """Bytes of the files; raises `UsageError` if the hub would not take them."""
    sizes = {name: (path / name).stat().st_size for name in names}
    if len(names) > MAX_FILES:
        raise UsageError(
            f"this cache has {len(names):,} files, the hub takes {MAX_FILES:,} per repository; "
            "extract it with larger --part-positions"
        )
    entries = {(str(p), q) for n in names for p, q in _steps(PurePosixPath(n))}
    folder, count = Counter(parent for parent, _ in entries).most_common(1)[0]
    if count > MAX_ENTRIES:
        raise UsageError(
            f"the folder {folder} has {count:,} entries, the hub takes {MAX_ENTRIES:,}; "
            "extract it with larger --part-positions"
        )
    name = max(names, key=lambda name: sizes[name])
    if sizes[name] > MAX_FILE_BYTES:
        raise UsageError(
            f"{name} has {sizes[name] / 1e9:.0f} GB, the hub takes {MAX_FILE_BYTES / 1e9:.0f} GB "
            "per file; extract it with smaller --part-positions"
        )
    return sum(sizes.values())


def _steps(path: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    """(folder, entry) for every step of a path."""
    while path.name:
        yield path.parent, path.name
        path = path.parent


@contextmanager
def hub_errors(repo_id: str, kind: str = "dataset") -> Iterator[None]:
    """Turns errors of the hub's client into ours: what went wrong and what to do, no traceback.

    `kind` is that of the repository: `dataset` or `model`.
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
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise NoSpaceError("the disk is full; what is there stays for the next try") from None
        offline = isinstance(error, ConnectionError | TimeoutError | hub.LocalEntryNotFoundError)
        if offline or library.startswith(("httpx", "requests")):
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise ResiduaError(
                f"the hub cannot be reached: {text}; the same command goes on from here"
            ) from None
        raise
