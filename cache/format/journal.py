"""The journal of a cache: JSON records that commit the shards of each part.

A part's record is written after its shards; rows without a record are not data. `PartWriter`
commits, `CacheArray` and `ActivationCache` ask which arrays of a part are committed, and `verify`
compares shards with their records. cache/README.md has the format.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, LeaseLostError, NotFoundError
from ..files.confined_files import is_confined_name, read_confined
from ..files.json_fields import (
    MAX_JSON_BYTES,
    FieldError,
    as_digest,
    as_integer,
    as_object,
    as_text,
    boolean_field,
    checking_fields,
    integer_field,
    list_field,
    number_field,
    object_field,
    shown,
)
from ..files.json_files import parse_json, write_json
from ..files.paths import is_remote, list_folder, read_all
from .layout import MAX_PARTS
from .logits_arrays import FULL_ARRAY, TOP_ARRAYS
from .manifest import Manifest

MAX_CRC32C = (1 << 32) - 1
REBUILT = "rebuilt"
"""Key of a commit record that repair made again from the shards."""
MEND_ADVICE = "`residua repair` makes it again from what is whole"
_RECORD_NAME = re.compile(r"(\d{8})(?:\.([1-9]\d*))?\.json", re.ASCII)
_PART_ARRAY = re.compile(r"residual/(0|[1-9]\d*)", re.ASCII)
_TABLE = re.compile(r"(tokens|sequences|context|contexts)/.+", re.DOTALL)


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
    rebuilt: bool = False
    """Whether repair made the record from the shards: `absmax` is then that of stored values."""


@dataclass(frozen=True)
class BaseRecord:
    """Content of `base.json`, or of one `base.<n>.json`."""

    arrays: dict[str, dict[str, ShardRecord]] = field(default_factory=dict)
    """One-dimensional array such as `tokens/ids` -> number of a shard -> shard."""
    files: dict[str, str] = field(default_factory=dict)
    """Name of a file below the cache -> hex sha256."""


class Journal:
    """The folder `journal/` of a cache.

    A part may have several records: the first, `<part>.json`, and `<part>.<n>.json` for arrays
    that were added later. Exactly the arrays that the records of a part name are committed.
    Records never change on disk, so each is read once and remembered. With the `manifest` of the
    cache, records whose rows or arrays the cache cannot have raise `CorruptError` like damaged
    ones.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self._manifest = manifest
        self._bases: dict[str, BaseRecord] = {}
        self._records: dict[str, PartRecord] = {}

    def commit(self, record: PartRecord) -> None:
        """Write `record`, which commits the arrays in it; atomic and durable.

        Raises `LeaseLostError` if another worker wrote the same record meanwhile.
        """
        self._write(f"{record.part:08d}", record_json(record))

    def commit_base(self, arrays: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Record the shards of the one-dimensional arrays and the sha256 of all other files.

        `arrays` is name -> shard number -> `bytes` and `crc32c`; `files` is path -> hex sha256.
        Later records, `base.<n>.json`, add to the first: the metadata of layers added later.
        """
        self._write("base", {"arrays": arrays, "files": files})

    def base(self) -> tuple[dict[str, dict[str, ShardRecord]], dict[str, str]]:
        """Merge all records of `commit_base`: arrays and files as in `BaseRecord`.

        Raises `NotFoundError` if `base.json` is missing, `CorruptError` if a record is damaged.
        """
        arrays, files = {}, {}
        paths = self.base_paths()
        if not paths or paths[0].name != "base.json":
            raise NotFoundError(f"{self.folder / 'base.json'} is missing; {MEND_ADVICE}")
        for path in paths:
            if path.name not in self._bases:
                self._bases[path.name] = self.read_base(path.name)
            arrays |= self._bases[path.name].arrays
            files |= self._bases[path.name].files
        return arrays, files

    def read_base(self, name: str) -> BaseRecord:
        """Read the base record `name`; raises `NotFoundError` or `CorruptError`."""
        raw = self._read(name)
        with _advising_repair():
            return parse_base(raw, self.folder / name)

    def read_record(self, name: str) -> PartRecord:
        """Read the commit record `name`; raises `NotFoundError` or `CorruptError`."""
        return self._parse(self._read(name), self.folder / name)

    def _read(self, name: str) -> bytes:
        """The bytes of a record, a regular file in the cache."""
        try:
            if is_remote(self.folder):
                return (self.folder / name).read_bytes()
            # From the cache's folder on: `journal` itself must be no link either.
            return read_confined(self.folder.parent, f"{self.folder.name}/{name}", MAX_JSON_BYTES)
        except FileNotFoundError:
            raise NotFoundError(f"{self.folder / name} is missing; {MEND_ADVICE}") from None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write `<name>.json`, or the first free `<name>.<n>.json`.

        Raises `LeaseLostError` if another worker wrote that file meanwhile, which can happen only
        in object stores, where leases expire.
        """
        number = 1 + max((n for n, _ in self._list(_pattern(name))), default=-1)
        path = self.folder / record_name(name, number)
        try:
            write_json(path, value, new=True)
        except FileExistsError:
            raise LeaseLostError(f"another worker wrote {path} meanwhile") from None

    def parts(self) -> dict[int, PartRecord]:
        """Part -> record, for all parts with a record; the records of one part are merged.

        Raises `CorruptError` for a damaged record.
        """
        paths = self.paths()
        unread = [path for path in paths if path.name not in self._records]
        if is_remote(self.folder):
            for path, raw in zip(unread, read_all(unread), strict=True):
                self._records[path.name] = self._parse(raw, path)
        else:
            for path in unread:
                self._records[path.name] = self.read_record(path.name)
        return merge_records(self._records[path.name] for path in paths)

    def arrays_of(self, part: int) -> set[str]:
        """Names of the committed arrays of `part`; reads the records of this part alone."""
        paths = [path for path in self.paths() if path.name.startswith(f"{part:08d}.")]
        for path in paths:
            if path.name not in self._records:
                self._records[path.name] = self.read_record(path.name)
        return {name for path in paths for name in self._records[path.name].arrays}

    def _parse(self, raw: bytes, path: Path) -> PartRecord:
        """Parse a commit record and compare it with the manifest."""
        with _advising_repair():
            record = parse_record(raw, path)
            if self._manifest is not None and (reason := misfit(record, self._manifest)):
                raise CorruptError(f"{path} is not a commit record of this cache: {reason}")
            return record

    def paths(self) -> list[Path]:
        """Files of the commit records by part; later records of a part after earlier ones."""
        return [path for _, path in self._list(_RECORD_NAME)]

    def base_paths(self) -> list[Path]:
        """Files of the base records, `base.json` first."""
        return [path for _, path in self._list(_pattern("base"))]

    def _list(self, pattern: "re.Pattern[str]") -> list[tuple[int, Path]]:
        """Number n and path of the records that match `pattern`, sorted by name and n.

        The groups of `pattern` are the name, and n or nothing for the first record.
        """
        records = []
        for path in list_folder(self.folder):
            if match := pattern.fullmatch(path.name):
                records.append((match[1], int(match[2] or 0), path))
        records.sort(key=lambda record: record[:2])
        return [(number, path) for _, number, path in records]


@contextmanager
def _advising_repair() -> Iterator[None]:
    """Say in errors about a damaged record what to do."""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(f"{error}; {MEND_ADVICE}") from None


def _pattern(name: str) -> "re.Pattern[str]":
    """Pattern of the records `<name>.json` and `<name>.<n>.json`."""
    return re.compile(rf"({name})(?:\.([1-9]\d{{0,17}}))?\.json", re.ASCII)


def record_name(name: str, number: int) -> str:
    """File name of record `number` of a part, `00000003`, or of `base`."""
    return f"{name}.{number}.json" if number else f"{name}.json"


def record_number(name: str) -> tuple[str, int]:
    """Inverse of `record_name`: the part's digits or `base`, and the number of the record."""
    stem, *number = name.removesuffix(".json").split(".")
    return stem, int(number[0]) if number else 0


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


def record_json(record: PartRecord) -> dict[str, Any]:
    """The JSON object of a commit record, without its digest."""
    arrays = {name: asdict(shard) for name, shard in record.arrays.items()}
    value: dict[str, Any] = {
        "part": record.part,
        "rows": [record.start, record.stop],
        "arrays": arrays,
    }
    if record.quarantine:
        value["quarantine"] = {str(k): reason for k, reason in record.quarantine.items()}
    if record.rebuilt:
        value[REBUILT] = True
    return value


def parse_record(raw: bytes, path: Path) -> PartRecord:
    """Parse the bytes of the commit record at `path`; raises `CorruptError` for other bytes.

    The part must be that of the file's name; unknown fields at the top level are ignored.
    """
    value = parse_json(raw, path)
    with checking_fields(path, "a commit record"):
        part = integer_field(value, "part", 0, MAX_PARTS - 1)
        if path.name.partition(".")[0] != f"{part:08d}":
            raise FieldError(f"part is {part}, not that of the file's name")
        start, stop = (as_integer(row, "rows") for row in list_field(value, "rows", 2, 2))
        if not start < stop:
            raise FieldError(f"rows are {start} to {stop}; expected a first row before the end")
        arrays = {}
        for name, shard in object_field(value, "arrays").items():
            if not (_PART_ARRAY.fullmatch(name) or name in (FULL_ARRAY, *TOP_ARRAYS)):
                raise FieldError(f"arrays has the unknown array {shown(name)}")
            arrays[name] = _parse_shard(as_object(shard, name))
        quarantine = {}
        for number, reason in as_object(value.get("quarantine", {}), "quarantine").items():
            if not re.fullmatch(r"0|[1-9]\d{0,17}", number, re.ASCII):
                raise FieldError(f"quarantine has the sequence {shown(number)}")
            quarantine[int(number)] = as_text(reason, "quarantine")
        rebuilt = boolean_field(value, REBUILT) if REBUILT in value else False
    return PartRecord(part, start, stop, arrays, quarantine, rebuilt)


def _parse_shard(shard: dict[str, Any]) -> ShardRecord:
    """The shard of a part from its JSON object."""
    return ShardRecord(
        bytes=integer_field(shard, "bytes"),
        crc32c=integer_field(shard, "crc32c", 0, MAX_CRC32C),
        absmax=number_field(shard, "absmax", 0.0),
        nonfinite=integer_field(shard, "nonfinite"),
    )


def parse_base(raw: bytes, path: Path) -> BaseRecord:
    """Parse the bytes of the base record at `path`; raises `CorruptError` for other bytes."""
    value = parse_json(raw, path)
    with checking_fields(path, "a base record"):
        arrays: dict[str, dict[str, ShardRecord]] = {}
        for name, shards in object_field(value, "arrays").items():
            if not (_TABLE.fullmatch(name) and is_confined_name(name)):
                raise FieldError(f"arrays has the unknown array {shown(name)}")
            arrays[name] = {}
            for number, shard in as_object(shards, name).items():
                if not re.fullmatch(r"0|[1-9]\d{0,9}", number, re.ASCII):
                    raise FieldError(f"{name} has the shard {shown(number)}")
                shard = as_object(shard, name)
                arrays[name][number] = ShardRecord(
                    integer_field(shard, "bytes"), integer_field(shard, "crc32c", 0, MAX_CRC32C)
                )
        files = {}
        for name, digest in object_field(value, "files").items():
            if not is_confined_name(name):
                raise FieldError(f"files names {shown(name)}, which is no file of the cache")
            files[name] = as_digest(digest, name)
    return BaseRecord(arrays, files)


def misfit(record: PartRecord, manifest: Manifest) -> str | None:
    """Why the cache of `manifest` cannot have `record`; None if it can."""
    positions, layout = manifest.tokens.positions, manifest.layout
    if record.part >= layout.parts(positions):
        return f"part {record.part} of {layout.parts(positions)} parts"
    rows = layout.rows(record.part, positions)
    if (record.start, record.stop) != rows:
        return f"rows {record.start}-{record.stop - 1}, not {rows[0]}-{rows[1] - 1}"
    for name in record.arrays:
        layer = _PART_ARRAY.fullmatch(name)
        if layer and (len(layer[1]) > 9 or int(layer[1]) > manifest.depth):
            return f"array {name[:80]}, but the last layer is {manifest.depth}"
    if any(sequence >= manifest.tokens.sequences for sequence in record.quarantine):
        return f"a quarantined sequence beyond the last of {manifest.tokens.sequences}"
    return None
