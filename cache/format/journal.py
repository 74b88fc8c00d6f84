"""The journal: one commit record per part, written last; rows without a record are not data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, LeaseLostError, NotFoundError
from ..files.json_files import parse_json, read_json, write_json
from ..files.paths import list_folder, read_all


@dataclass(frozen=True)
class ShardRecord:
    """What was written of one array for one part."""

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
    """Commit record of one part: its rows and, per array, its shard."""

    part: int
    start: int
    """First position of the part."""
    stop: int
    """End of the part."""
    arrays: dict[str, ShardRecord] = field(default_factory=dict)
    quarantine: dict[int, str] = field(default_factory=dict)
    """Sequence -> why its rows in this part are not to be used."""


class Journal:
    """The folder `journal/` of a cache.

    A part may have several records: the first, `<part>.json`, and `<part>.<n>.json` for arrays
    that were added later. What the records of a part name is committed, and nothing else.
    Records never change: what was read is remembered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bases: dict[str, dict[str, Any]] = {}
        self._records: dict[str, PartRecord] = {}

    def commit(self, record: PartRecord) -> None:
        """Make the arrays of `record` count; atomic and durable."""
        arrays = {name: vars(shard) for name, shard in record.arrays.items()}
        value = {"part": record.part, "rows": [record.start, record.stop], "arrays": arrays}
        if record.quarantine:
            value["quarantine"] = {str(k): reason for k, reason in record.quarantine.items()}
        self._write(f"{record.part:08d}", value)

    def commit_base(self, arrays: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Record the shards of the one-dimensional arrays and the sha256 of all other files.

        Later records, `base.<n>.json`, add to the first: the metadata of layers added later.
        """
        self._write("base", {"arrays": arrays, "files": files})

    def base(self) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, str]]:
        """What `commit_base` recorded: array -> shard -> numbers, and file -> sha256."""
        arrays, files = {}, {}
        paths = [path for _, path in self._list(r"(base)(?:\.(\d+))?\.json")]
        if not paths or paths[0].name != "base.json":
            read_json(self.folder / "base.json")  # raises
        for path in paths:
            if path.name not in self._bases:
                self._bases[path.name] = read_json(path)
            arrays |= self._bases[path.name]["arrays"]
            files |= self._bases[path.name]["files"]
        return arrays, files

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write `<name>.json`, or the first free `<name>.<n>.json`.

        Raises `LeaseLostError` if another worker has just written the same, which only happens
        where leases expire.
        """
        number = 1 + max((n for n, _ in self._list(rf"({name})(?:\.(\d+))?\.json")), default=-1)
        path = self.folder / (f"{name}.{number}.json" if number else f"{name}.json")
        try:
            write_json(path, value, new=True)
        except FileExistsError:
            raise LeaseLostError(f"another worker wrote {path} meanwhile") from None

    def parts(self) -> dict[int, PartRecord]:
        """All committed parts, the records of a part merged."""
        paths = self.paths()
        new = [path for path in paths if path.name not in self._records]
        for path, raw in zip(new, read_all(new), strict=True):
            self._records[path.name] = parse_record(raw, path)
        return merge_records(self._records[path.name] for path in paths)

    def arrays_of(self, part: int) -> set[str]:
        """Arrays that the records of `part` name; reads no other record."""
        paths = [path for path in self.paths() if path.name.startswith(f"{part:08d}.")]
        for path in paths:
            if path.name not in self._records:
                self._records[path.name] = read_record(path)
        return {name for path in paths for name in self._records[path.name].arrays}

    def paths(self) -> list[Path]:
        """Files of the commit records, later ones of a part after the earlier."""
        return [path for _, path in self._list(r"(\d{8})(?:\.(\d+))?\.json")]

    def _list(self, pattern: str) -> list[tuple[int, Path]]:
        """Number n and path of the records whose names are `pattern`, sorted by name and n."""
        found = []
        for path in list_folder(self.folder):
            if match := re.fullmatch(pattern, path.name):
                found.append((match[1], int(match[2] or 0), path))
        return [(number, path) for _, number, path in sorted(found, key=lambda f: f[:2])]


def merge_records(records: Iterable[PartRecord]) -> dict[int, PartRecord]:
    """One record per part; where two name an array, the later one holds."""
    found: dict[int, PartRecord] = {}
    for record in records:
        known = found.get(record.part)
        if known is not None:
            arrays = {**known.arrays, **record.arrays}
            quarantine = {**known.quarantine, **record.quarantine}
            record = replace(record, arrays=arrays, quarantine=quarantine)
        found[record.part] = record
    return found


def read_record(path: Path) -> PartRecord:
    """The commit record in the file `path`; raises `CorruptError` if it is none."""
    try:
        return parse_record(path.read_bytes(), path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None


def parse_record(raw: bytes, path: Path) -> PartRecord:
    """The commit record whose bytes are `raw`."""
    value = parse_json(raw, path)
    try:
        arrays = {name: ShardRecord(**shard) for name, shard in value["arrays"].items()}
        start, stop = value["rows"]
        quarantine = {int(k): str(reason) for k, reason in value.get("quarantine", {}).items()}
        return PartRecord(value["part"], start, stop, arrays, quarantine)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a commit record: {error}") from None
