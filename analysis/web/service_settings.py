"""Settings of a service: the root that it serves, who may do what, and how much."""

import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.errors import UsageError
from ...cache.files.paths import check_not_served, is_remote


@dataclass(frozen=True)
class ServiceSettings:
    """What `residua serve` was started with."""

    root: Path
    """Folder or object store of the caches."""
    state: Path
    """Local folder of the service's own files: tokens, jobs, uploaded texts."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 0
    """Port to listen at; 0 takes a free one."""
    private: bool = False
    """Whether reading needs a token, too."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may call the service by, beside IP addresses, localhost and the name of
    the machine; `*` for any."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may read, beside those of this machine; `*` for any."""
    models: tuple[Path, ...] = ()
    """Folders under which the models of jobs must lie."""
    texts: tuple[Path, ...] = ()
    """Folders under which the texts of jobs must lie, beside uploaded ones."""
    hub: bool = False
    """Whether jobs may name models and texts of the hub."""
    remote_code: bool = False
    """Whether jobs may run code that comes with a model."""
    scheduler: str | None = None
    """Address of a dask scheduler that runs the jobs; None for workers of the service's own."""
    workers: int = 1
    """Number of the service's own workers, each of which runs one job at a time."""
    accel: str | None = None
    """Path, such as `/_files/`, under which the proxy in front gives the files of the root: the
    service answers for committed shards with `X-Accel-Redirect`. None sends them itself."""
    max_connections: int = 512
    """Requests that are answered at the same time; more are refused with 503."""
    header_seconds: float = 10.0
    """Longest time to send the head of a request, in seconds."""
    body_seconds: float = 60.0
    """Longest time between two pieces of a request's body, in seconds."""
    send_seconds: float = 60.0
    """Longest time that a reader may take for one piece of an answer, in seconds."""
    drain_seconds: float = 20.0
    """Time that requests have to end once the service was told to stop, in seconds."""
    machine: str = field(default_factory=socket.gethostname)
    """Name of this machine."""


def default_state(root: Path) -> Path:
    """Folder of the service's own files: `.service` in a local root, else in the user's folder."""
    if not is_remote(root):
        return root / ".service"
    from ...cache.files.json_files import json_digest
    from ...cache.store.catalog import cache_root

    folder = cache_root(None)
    base = folder if not is_remote(folder) else Path.home() / ".cache" / "residua"
    return base / ".service" / json_digest(str(root))[:12]


def make_settings(root: Path, state: Path, **options: Any) -> ServiceSettings:
    """Settings from the options of `residua serve`; folders are resolved, links followed.

    Raises `UsageError` for a folder that does not exist, and for a wrong --accel.
    """
    check_not_served(root, "name the folder or object store that it serves")
    for name in ("models", "texts"):
        folders = tuple(Path(folder).resolve() for folder in options.get(name, ()))
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UsageError(f"--{name} {missing[0]}: there is no such folder")
        options[name] = folders
    given = {
        "allowed_hosts": tuple(options.pop("allow_host", ())),
        "allowed_origins": tuple(options.pop("allow_origin", ())),
        "remote_code": options.pop("trust_remote_code", False),
    }
    accel = options.get("accel")
    if accel is not None and is_remote(root):
        raise UsageError("--accel is for a root on a disk, whose files the proxy can open")
    if accel is not None and not re.fullmatch(r"/([A-Za-z0-9_.-]+/)+", accel):
        raise UsageError(f"--accel is a path with a slash at both ends, like /_files/: {accel!r}")
    return ServiceSettings(root=root, state=state, **given, **options)
