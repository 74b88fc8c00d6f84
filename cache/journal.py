"""The journal: one commit record per part, written last; rows without a record are not data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CorruptError
from .jsonfile import read_json, write_json


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
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, record: PartRecord) -> None:
        """Make the arrays of `record` count; atomic and durable."""
        arrays = {name: vars(shard) for name, shard in record.arrays.items()}
        value = {"part": record.part, "rows": [record.start, record.stop], "arrays": arrays}
        if record.quarantine:
            value["quarantine"] = {str(k): reason for k, reason in record.quarantine.items()}
        write_json(self._free(f"{record.part:08d}"), value)

    def commit_base(self, arrays: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Record the shards of the one-dimensional arrays and the sha256 of all other files.

        Later records, `base.<n>.json`, add to the first: the metadata of layers added later.
        """
        write_json(self._free("base"), {"arrays": arrays, "files": files})

    def base(self) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, str]]:
        """What `commit_base` recorded: array -> shard -> numbers, and file -> sha256."""
        arrays, files = {}, {}
        for path in [self.folder / "base.json", *self._numbered("base")]:
            record = read_json(path)
            arrays |= record["arrays"]
            files |= record["files"]
        return arrays, files

    def _numbered(self, name: str) -> list[Path]:
        """`<name>.1.json`, `<name>.2.json`, ... as far as they go without a gap."""
        paths = []
        while (path := self.folder / f"{name}.{len(paths) + 1}.json").exists():
            paths.append(path)
        return paths

    def _free(self, name: str) -> Path:
        """`<name>.json`, or the first free `<name>.<n>.json`."""
        first = self.folder / f"{name}.json"
        return (
            self.folder / f"{name}.{len(self._numbered(name)) + 1}.json"
            if first.exists()
            else first
        )

    def parts(self) -> dict[int, PartRecord]:
        """All committed parts, the records of a part merged."""
        return merge(read_record(path) for path in self.paths())

    def paths(self) -> list[Path]:
        """Files of the commit records, later ones of a part after the earlier."""
        found = []
        for path in self.folder.glob("*.json"):
            if match := re.fullmatch(r"(\d{8})(?:\.(\d+))?\.json", path.name):
                found.append((match[1], int(match[2] or 0), path))
        return [path for _, _, path in sorted(found)]


def merge(records: Iterable[PartRecord]) -> dict[int, PartRecord]:
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
    value = read_json(path)
    try:
        arrays = {name: ShardRecord(**shard) for name, shard in value["arrays"].items()}
        start, stop = value["rows"]
        quarantine = {int(k): str(reason) for k, reason in value.get("quarantine", {}).items()}
        return PartRecord(value["part"], start, stop, arrays, quarantine)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a commit record: {error}") from None
