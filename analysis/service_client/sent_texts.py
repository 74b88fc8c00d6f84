"""Texts of this machine for jobs of a server: sent once, under the digest of their content."""

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ...cache.documents.data_files import STANDARD_INPUT, data_paths
from ...cache.errors import InputTypeError, NotFoundError, UsageError
from ..jobs.job_commands import OUTPUTS
from ..jobs.job_inputs import LIST_NAME
from .server_connection import ServerConnection

MAX_NAME = 100


def send_data(connection: ServerConnection, data: str, data_format: str | None = None) -> str:
    """The argument `data` of a job for the texts that `data` names on this machine.

    Files, one or those of a pattern or folder, and standard input for `-` are sent, unless the
    server has them. What is not there is the server's to find: a name under its folders, or on the
    hub. Raises `UsageError` for a folder that `datasets` saved.
    """
    if data == STANDARD_INPUT:
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            return _send(connection, file, f"standard-input.{data_format or 'txt'}")
    path = Path(data).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return _send(connection, file, path.name)
    if paths := data_paths(data):
        return _send_several(connection, paths)
    if path.is_dir():
        raise UsageError(
            f"{data} is no folder of text files, which alone are sent to a server; name a folder "
            "that the server has (--texts)"
        )
    return data


def _send_several(connection: ServerConnection, paths: Sequence[Path]) -> str:
    """Send files, and a list of them in their order."""
    files = []
    for path in paths:
        with path.open("rb") as file:
            _, digest, name = re.split("[:/]", _send(connection, file, path.name))
        files.append({"sha256": digest, "name": name})
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps({"files": files}).encode())
        return _send(connection, file, LIST_NAME, is_list=True)


def send_rows(connection: ServerConnection, rows: Iterable[Any]) -> str:
    """The argument `data` of a job for texts in Python: strings, or dictionaries of columns."""
    with tempfile.TemporaryFile() as file:
        for row in rows:
            if not isinstance(row, str | Mapping):
                raise InputTypeError(
                    f"texts are strings or dictionaries, not {type(row).__name__}; other data are "
                    "sent as a file"
                )
            value = {"text": row} if isinstance(row, str) else dict(row)
            file.write(json.dumps(value).encode() + b"\n")
        file.seek(0)
        return _send(connection, file, "texts.jsonl")


def _send(connection: ServerConnection, file: IO[bytes], name: str, is_list: bool = False) -> str:
    """Send an open file, whose name says the format; returns `upload:<sha256>/<name>`."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    path = f"/v1/texts/{digest.hexdigest()}"
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-")[-MAX_NAME:].lstrip("._-") or "texts"
    if plain == LIST_NAME and not is_list:
        plain = f"texts-{plain}"
    try:
        return str(connection.get(path, name=plain)["data"])
    except NotFoundError:
        file.seek(0)
        return str(connection.send_file(path, file, name=plain)["data"])


def fetch_outputs(
    connection: ServerConnection, job: Mapping[str, Any], outputs: Mapping[str, Path]
) -> dict[str, str]:
    """Fetch what a job wrote; name in the results of the job -> path of this machine."""
    paths = {f"files/{OUTPUTS[name]}": str(path) for name, path in outputs.items()}
    for name in job["files"]:
        first, _, rest = str(name).partition("/")
        argument = next((key for key, value in OUTPUTS.items() if value == first), "")
        if argument not in outputs or ".." in name.split("/") or "\0" in name:
            continue
        target = outputs[argument] / rest if rest else outputs[argument]
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for block in connection.download(f"/v1/jobs/{job['id']}/files/{name}"):
                file.write(block)
        paths[f"files/{name}"] = str(target)
    return paths
