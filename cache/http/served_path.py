"""Paths of the objects of a residua service, such as `http://localhost:8765/caches/<id>`.

They behave like paths of pathlib, as far as caches and probes are read; `as_path` makes them of a
user's URL. The address of a service stands for its root: its folder lists the caches.
"""

import stat as stat_modes
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from ..errors import UsageError

if TYPE_CHECKING:
    from .served_file_system import ServedFileSystem

SCHEMES = ("http://", "https://")


class ServedPath(PurePosixPath):
    """A file or folder of a service. `fs` and `path` are those of fsspec, as in `UPath`."""

    __slots__ = ()

    def __str__(self) -> str:
        scheme, *names = self.parts or ("",)
        return f"{scheme}//{'/'.join(names)}" if scheme.endswith(":") else "/".join(self.parts)

    def __fspath__(self) -> str:
        raise UsageError(f"{self} is no file of this machine; it is read over HTTP")

    @property
    def origin(self) -> str:
        """Scheme, host and port of the service."""
        return f"{self.parts[0]}//{self.parts[1]}"

    @property
    def path(self) -> str:
        """The part of the URL after the origin: empty, or it begins with a slash."""
        return "".join(f"/{name}" for name in self.parts[2:])

    @property
    def fs(self) -> "ServedFileSystem":
        """The objects of the service."""
        from .served_file_system import ServedFileSystem

        return ServedFileSystem(self.origin)

    # Reading

    def open(self, mode: str = "rb", **_: Any) -> Any:
        """Open the object for reading bytes."""
        return self.fs.open(self.path, mode)

    def read_bytes(self, most: int | None = None) -> bytes:
        """All bytes of the object; raises `UnreachableError` for more than `most`."""
        return self.fs.read_whole(self.path, most)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding, errors)

    def stat(self, **_: Any) -> "ServedStatus":
        """Size and time of the object, or the kind of a folder."""
        status = self.fs.info(self.path)
        return ServedStatus(status["type"] == "file", status["size"], status.get("mtime", 0.0))

    def exists(self, **_: Any) -> bool:
        """Whether the service has this object or folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether the service has this object."""
        if len(self.parts) < 3:
            return False
        try:
            self.fs.client.status(self.path)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether the service has this folder."""
        try:
            next(iter(self.fs.ls(self.path)), None)
        except FileNotFoundError:
            return False
        return True

    def is_symlink(self) -> bool:
        """False: a service gives no links."""
        return False

    def iterdir(self) -> Iterator["ServedPath"]:
        """Files and folders in this folder; of the address of a service, its caches."""
        for name in self.fs.ls(self.path, detail=False):
            yield self._at(name)

    def glob(self, pattern: str, **_: Any) -> Iterator["ServedPath"]:
        """Files and folders in this folder whose names match `pattern`; none if there is none."""
        try:
            yield from (path for path in self.iterdir() if fnmatchcase(path.name, pattern))
        except FileNotFoundError:
            return

    def rglob(self, pattern: str, **_: Any) -> Iterator["ServedPath"]:
        """Files below this folder whose names match `pattern`."""
        for name in self.fs.find(self.path):
            if fnmatchcase(name.rpartition("/")[2], pattern):
                yield self._at(name)

    def _at(self, path: str) -> "ServedPath":
        """The place with another path of the same service."""
        return ServedPath(f"{self.origin}{path}")

    def absolute(self) -> "ServedPath":
        """This path."""
        return self

    def resolve(self, strict: bool = False) -> "ServedPath":
        """This path."""
        return self

    def expanduser(self) -> "ServedPath":
        """This path."""
        return self

    # Writing

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        from .served_file_system import read_only_error

        raise read_only_error(str(self))

    mkdir = write_bytes = write_text = touch = rename = replace = rmdir = symlink_to = chmod = (
        _refuse
    )

    def unlink(self, missing_ok: bool = False) -> None:
        """Refused."""
        self._refuse()


class ServedStatus:
    """What `stat` says of an object or folder of a service."""

    def __init__(self, is_file: bool, size: int, modified: float) -> None:
        self.st_mode = stat_modes.S_IFREG if is_file else stat_modes.S_IFDIR
        self.st_size = size
        self.st_mtime = modified


def is_served(path: Any) -> bool:
    """Whether `path` is a place of a service, which is only read."""
    return isinstance(path, ServedPath)


def served_path(url: str) -> ServedPath:
    """The place of a URL `http://...`; raises `UsageError` for one that is no such place."""
    try:
        parts = urlsplit(url)
        is_right = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, is_right = None, False
    if parts is None or not is_right or parts.query or parts.fragment or "\\" in url:
        raise UsageError(
            f"{url} is no address of a residua service, such as http://localhost:8765 or "
            "http://localhost:8765/caches/3f2a..."
        )
    if "@" in parts.netloc:
        raise UsageError(
            f"the address of {parts.hostname} has a user or password in it; set $RESIDUA_TOKEN "
            "instead"
        )
    if any(name in (".", "..") for name in parts.path.split("/")):
        raise UsageError(f"{url} has a part '.' or '..'; name the place itself")
    return ServedPath(f"{parts.scheme}://{parts.netloc}{parts.path}")


def served_root(path: Any) -> Any:
    """The root that a user named by the address of a service, or of its folder of caches."""
    return path.parent if path.name == "caches" and len(path.parts) > 2 else path
