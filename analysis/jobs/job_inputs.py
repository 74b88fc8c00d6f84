"""Models and texts of jobs: only below the folders of the settings, uploaded, or on the hub.

A job names its model and texts. Neither may lead anywhere else on the server's disk: paths are
resolved, links too, and so are the files of a model's folder.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...cache.documents.data_files import STANDARD_INPUT
from ...cache.errors import (
    CorruptError,
    LimitError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from ...cache.files.confined_files import read_confined
from ...cache.files.disk_errors import translate_disk_errors
from ...cache.files.json_fields import (
    as_object,
    digest_field,
    list_field,
    parse_json_object,
    text_field,
)
from ...cache.files.json_files import make_folder, sync_folder
from ...cache.files.paths import open_new
from ...cache.files.staging import publish_folder, staging_folder
from .job_settings import JobSettings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(:[\w.-]{1,96})?")
UPLOAD = re.compile(r"upload:([0-9a-f]{64})/([A-Za-z0-9][A-Za-z0-9._-]{0,99})")
"""An uploaded text in the arguments of a job: `upload:<sha256>/<name>`."""
TEXT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
UPLOADS_FOLDER = "texts"
"""Folder of uploaded texts in the state."""
LIST_NAME = "several.json"
"""Name of an uploaded list of other uploads, in their order: {"files": [{"sha256", "name"}]}."""
MAX_LIST_BYTES = 8 << 20
MAX_FILES = 20_000
"""Most files of a model or of texts."""


def confine_model(settings: JobSettings, name: Any) -> Path | str:
    """Folder of the model `name` below the folders of models; a hub id unchanged, if allowed.

    `name` is absolute, or relative to one of the folders. Raises `UsageError` for a folder, or a
    file in it, that lies elsewhere.
    """
    path = _find_below(settings.models, name)
    if path is not None:
        return path
    if settings.allow_hub and HUB_ID.fullmatch(str(name)):
        return str(name)
    raise UsageError(_refusal("model", name, settings.models, settings.allow_hub))


def confine_data(settings: JobSettings, name: Any) -> Path | str:
    """File or folder of texts, below the folders of texts or uploaded; a hub id, if allowed.

    A pattern (`shards/*.jsonl`) may have its wildcards in the last part. Raises as
    `confine_model`.
    """
    text = str(name)
    if match := UPLOAD.fullmatch(text):
        if match[2] == LIST_NAME:
            return join_uploads(settings, match[1])
        return find_upload(settings, match[1], match[2])
    if text == STANDARD_INPUT:
        raise UsageError("a job reads no standard input; upload the texts")
    if glob.has_magic(text):
        folder, _, pattern = text.rpartition("/")
        parent = _find_below(settings.texts, folder or ".")
        if parent is not None and not glob.has_magic(folder) and ".." not in pattern:
            _check_links(settings.texts, parent.glob(pattern))
            return parent / pattern
    path = _find_below(settings.texts, text)
    if path is not None:
        return path
    if settings.allow_hub and HUB_ID.fullmatch(text):
        return text
    raise UsageError(_refusal("texts", name, settings.texts, settings.allow_hub))


def _find_below(folders: Sequence[Path], name: Any) -> Path | None:
    """The existing path `name` below one of `folders`, resolved; None if there is none."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    for folder in folders:
        path = (folder / name).resolve()
        with suppress(OSError):
            if path.exists() and path.is_relative_to(folder.resolve()):
                _check_links(folders, path.rglob("*") if path.is_dir() else [path])
                return path
    return None


def _check_links(folders: Sequence[Path], paths: Iterable[Path]) -> None:
    """Raise `UsageError` if one of `paths` is a link that leads out of `folders`."""
    roots = [folder.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if number >= MAX_FILES:
            raise UsageError(f"{path.parent} has more than {MAX_FILES} files")
        if path.is_symlink() or number == 0:
            target = path.resolve()
            if not any(target.is_relative_to(root) for root in roots):
                raise UsageError(f"{path} leads out of the folders that this server may read")


def _refusal(kind: str, name: Any, folders: Sequence[Path], allow_hub: bool) -> str:
    """Why a model or texts are refused."""
    option = "--models" if kind == "model" else "--texts"
    if not folders:
        where = f"this server reads none from its disk (it was started without {option})"
    else:
        where = f"the {kind} of a job must lie below {', '.join(map(str, folders))} on the server"
    hub = "" if allow_hub else "; it takes nothing from the hub (--hub)"
    return f"{kind} {str(name)[:200]!r} cannot be used: {where}{hub}"


def fingerprint(source: Path | str) -> str:
    """What tells that a model or texts have changed: names, sizes and times of the files."""
    if isinstance(source, str):
        return source
    paths = sorted(source.parent.glob(source.name)) if glob.has_magic(source.name) else [source]
    entries = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            status = os.stat(file)
            entries.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(entries).encode("utf-8", "surrogateescape")).hexdigest()


# Uploaded texts: <state>/texts/<sha256>/<name>


def find_upload(settings: JobSettings, digest: str, name: str) -> Path:
    """File of an uploaded text; raises `NotFoundError` if it was not uploaded."""
    path = settings.state / UPLOADS_FOLDER / digest / name
    if not path.is_file() or path.is_symlink():
        raise NotFoundError(f"no text {digest[:12]}/{name} was uploaded; upload it first")
    return path


def join_uploads(settings: JobSettings, digest: str) -> Path:
    """Folder of the uploads that an uploaded list names, as links that sort as the list does.

    Raises `UsageError` for a list that is none, `NotFoundError` for a text that is not there.
    """
    listed = find_upload(settings, digest, LIST_NAME)
    folder = listed.with_name("several")
    if folder.is_dir():
        return folder
    try:
        value = parse_json_object(
            read_confined(listed.parent, LIST_NAME, MAX_LIST_BYTES), "the list of texts"
        )
        items = [as_object(item, "a text") for item in list_field(value, "files", 1, MAX_FILES)]
        named = [(digest_field(item, "sha256"), text_field(item, "name", 100)) for item in items]
    except CorruptError as error:
        raise UsageError(f"the list of texts cannot be read: {error}") from None
    with (
        translate_disk_errors(settings.state),
        staging_folder(folder.parent, ".several-") as staged,
    ):
        for number, (sha256, name) in enumerate(named):
            if not TEXT_NAME.fullmatch(name) or name == LIST_NAME:
                raise UsageError(f"{name!r} cannot be the name of a text")
            os.link(find_upload(settings, sha256, name), staged / f"{number:05d}-{name}")
        try:
            publish_folder(staged, folder)
        except OSError:
            if not folder.is_dir():  # else another request has made it meanwhile
                raise
    return folder


class TextUpload:
    """Takes one uploaded text in pieces: `write` them, then `finish`; `discard` in any case."""

    def __init__(self, settings: JobSettings, digest: str, name: str) -> None:
        """Begin; raises `UsageError` for a name or digest that cannot be, `LimitError` if full."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise UsageError("a text is uploaded under its sha256, 64 hexadecimal digits")
        if not TEXT_NAME.fullmatch(name):
            raise UsageError(
                f"{name[:100]!r} cannot be the name of a text: letters, digits, `.`, `_` and `-`, "
                "such as texts.jsonl"
            )
        self._settings = settings
        self._digest = digest
        self._hash = hashlib.sha256()
        self._size = 0
        self._folder = settings.state / UPLOADS_FOLDER / digest
        self._target = self._folder / name
        self._kept = sum(_sizes(settings.state / UPLOADS_FOLDER))
        make_folder(self._folder)
        self._temporary = self._folder / f".{os.getpid()}-{id(self)}.tmp"
        self._file = open_new(self._temporary)

    def write(self, piece: bytes) -> None:
        """Take the next piece; raises `LimitError` for too many bytes, `NoSpaceError`."""
        self._size += len(piece)
        most = self._settings.most_upload_bytes
        if self._size > most:
            raise LimitError(f"the text is larger than {most} bytes, the most that is taken")
        if self._kept + self._size > self._settings.most_uploads_bytes:
            raise LimitError("the texts that were uploaded fill their share of the disk")
        self._hash.update(piece)
        with translate_disk_errors(self._folder):
            self._file.write(piece)

    def finish(self) -> Path:
        """Keep the text; raises `MismatchError` if it is not the text of the digest."""
        if self._hash.hexdigest() != self._digest:
            raise MismatchError(
                f"the text that came has the sha256 {self._hash.hexdigest()}, not {self._digest}; "
                "send it again"
            )
        with translate_disk_errors(self._folder):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._target)
            sync_folder(self._folder)
        return self._target

    def discard(self) -> None:
        """Remove what was not kept."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()


def _sizes(folder: Path) -> Iterator[int]:
    """Sizes of all files below `folder`."""
    for path in folder.glob("*/*"):
        with suppress(OSError):
            yield path.stat().st_size
