"""The journal of a cache: JSON records that commit the shards of each part.

A part's record is written after its shards; rows without a record are not data. `PartWriter`
commits, `CacheArray` and `ActivationCache` ask which arrays of a part are committed, and `verify`
compares shards with their records. cache/README.md has the format.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, LeaseLostError, NotFoundError
from ..files.json_files import parse_json, read_json, write_json
from ..files.paths import list_folder, read_all
from ..files.read_errors import read_file


@dataclass(frozen=True)
class ShardRecord:
    """Size, checksum and range of one array's shard of one part."""

    bytes: int
    """Size of the shard file."""
    crc32c: int
    """crc32c of the shard's chunk checksums."""
    absmax: float = 0.0
    """Largest finite absolute value, in float32, before the cast to the stored dtype."""
    nonfinite: int = 0
    """Number of infinities and NaNs."""


@dataclass(frozen=True)
class PartRecord:
    """Commit record of one part: range of rows, and one shard per array."""

    part: int
    start: int
    """First position of the part."""
    stop: int
    """First position after the part."""
    arrays: dict[str, ShardRecord] = field(default_factory=dict)
    """Name such as `residual/3` -> shard."""
    quarantine: dict[int, str] = field(default_factory=dict)
    """Number of a sequence with unusable rows in this part -> reason."""


class Journal:
    """The folder `journal/` of a cache.

    A part may have several records: the first, `<part>.json`, and `<part>.<n>.json` for arrays
    that were added later. Exactly the arrays that the records of a part name are committed.
    Records never change on disk, so each is read once and remembered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bases: dict[str, dict[str, Any]] = {}
        self._records: dict[str, PartRecord] = {}

    def commit(self, record: PartRecord) -> None:
        """Write `record`, which commits the arrays in it; atomic and durable.

        Raises `LeaseLostError` if another worker wrote the same record meanwhile.
        """
        arrays = {name: vars(shard) for name, shard in record.arrays.items()}
        value = {"part": record.part, "rows": [record.start, record.stop], "arrays": arrays}
        if record.quarantine:
            value["quarantine"] = {str(k): reason for k, reason in record.quarantine.items()}
        self._write(f"{record.part:08d}", value)

    def commit_base(self, arrays: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Record the shards of the one-dimensional arrays and the sha256 of all other files.

        `arrays` is name -> shard number -> `bytes` and `crc32c`; `files` is path -> hex sha256.
        Later records, `base.<n>.json`, add to the first: the metadata of layers added later.
        """
        self._write("base", {"arrays": arrays, "files": files})

    def base(self) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, str]]:
        """Merge all records of `commit_base`: arrays and files as described there.

        Raises `NotFoundError` if `base.json` is missing.
        """
        arrays, files = {}, {}
        paths = [path for _, path in self._list(r"(base)(?:\.(\d+))?\.json")]
        if not paths or paths[0].name != "base.json":
            read_json(self.folder / "base.json")  # raises NotFoundError
        for path in paths:
            if path.name not in self._bases:
                self._bases[path.name] = read_json(path)
            arrays |= self._bases[path.name]["arrays"]
            files |= self._bases[path.name]["files"]
        return arrays, files

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write `<name>.json`, or the first free `<name>.<n>.json`.

        Raises `LeaseLostError` if another worker wrote that file meanwhile, which can happen only
        in object stores, where leases expire.
        """
        number = 1 + max((n for n, _ in self._list(rf"({name})(?:\.(\d+))?\.json")), default=-1)
        path = self.folder / (f"{name}.{number}.json" if number else f"{name}.json")
        try:
            write_json(path, value, new=True)
        except FileExistsError:
            raise LeaseLostError(f"another worker wrote {path} meanwhile") from None

    def parts(self) -> dict[int, PartRecord]:
        """Part -> record, for all parts with a record; the records of one part are merged."""
        paths = self.paths()
        unread = [path for path in paths if path.name not in self._records]
        for path, raw in zip(unread, read_all(unread), strict=True):
            self._records[path.name] = parse_record(raw, path)
        return merge_records(self._records[path.name] for path in paths)

    def arrays_of(self, part: int) -> set[str]:
        """Names of the committed arrays of `part`; reads the records of this part alone."""
        paths = [path for path in self.paths() if path.name.startswith(f"{part:08d}.")]
        for path in paths:
            if path.name not in self._records:
                self._records[path.name] = read_record(path)
        return {name for path in paths for name in self._records[path.name].arrays}

    def paths(self) -> list[Path]:
        """Files of the commit records by part; later records of a part after earlier ones."""
        return [path for _, path in self._list(r"(\d{8})(?:\.(\d+))?\.json")]

    def _list(self, pattern: str) -> list[tuple[int, Path]]:
        """Number n and path of the records that match `pattern`, sorted by name and n.

        The groups of `pattern` are the name, and n or nothing for the first record.
        """
        records = []
        for path in list_folder(self.folder):
            if match := re.fullmatch(pattern, path.name):
                records.append((match[1], int(match[2] or 0), path))
        records.sort(key=lambda record: record[:2])
        return [(number, path) for _, number, path in records]


def merge_records(records: Iterable[PartRecord]) -> dict[int, PartRecord]:
    """Merge records into one per part; if two name the same array, the later record counts."""
    merged: dict[int, PartRecord] = {}
    for record in records:
        earlier = merged.get(record.part)
        if earlier is not None:
            arrays = {**earlier.arrays, **record.arrays}
            quarantine = {**earlier.quarantine, **record.quarantine}
            record = replace(record, arrays=arrays, quarantine=quarantine)
        merged[record.part] = record
    return merged


def read_record(path: Path) -> PartRecord:
    """Read a commit record; raises `NotFoundError` or, for any other content, `CorruptError`."""
    try:
        return parse_record(read_file(path), path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None


def parse_record(raw: bytes, path: Path) -> PartRecord:
    """Parse the bytes of the commit record at `path`; raises `CorruptError` for other bytes."""
    value = parse_json(raw, path)
    try:
        arrays = {name: ShardRecord(**shard) for name, shard in value["arrays"].items()}
        start, stop = value["rows"]
        quarantine = {int(k): str(reason) for k, reason in value.get("quarantine", {}).items()}
        return PartRecord(value["part"], start, stop, arrays, quarantine)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a commit record: {error}") from None
