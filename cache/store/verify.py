"""Re-reads a whole cache and says what is damaged: file, array, rows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError, ResiduaError
from ..files.json_files import file_digest
from ..format.array import CacheArray
from ..format.journal import Journal, PartRecord, ShardRecord, merge_records, read_record
from ..format.manifest import Manifest
from ..progress import Progress


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    file: str
    """Path inside the cache."""
    message: str
    array: str | None = None
    """Name of the array, such as `residual/3`."""
    start: int | None = None
    """First damaged row of the array."""
    stop: int | None = None
    """End of the damaged rows."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    damages: tuple[Damage, ...]
    shards: int
    """Shards read."""
    bytes: int
    """Bytes read."""
    missing_parts: tuple[int, ...]
    """Parts that were never committed: the extraction is not finished."""

    @property
    def ok(self) -> bool:
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua verify`."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class _Shard:
    array: str
    number: int
    record: ShardRecord


def verify(path: Path, progress: Progress | None = None) -> Verification:
    """Check every file of the cache at `path` against its digest; reads everything once."""
    damages: list[Damage] = []
    journal = Journal(path / "journal")
    shards: list[_Shard] = []
    missing: tuple[int, ...] = ()
    try:
        manifest = Manifest.read(path / "manifest.json")
        missing = tuple(range(manifest.layout.parts(manifest.tokens.positions)))
    except ResiduaError as error:
        damages.append(Damage("manifest.json", str(error)))
    try:
        arrays, files = journal.base()
        damages += _check_files(path, files)
        shards += [
            _Shard(name, int(number), ShardRecord(**record))
            for name, records in arrays.items()
            for number, record in records.items()
        ]
    except (ResiduaError, KeyError, TypeError) as error:
        damages.append(Damage("journal/base.json", str(error)))
    parts = merge_records(_records(journal, damages))
    for number, record in parts.items():
        shards += [_Shard(name, number, shard) for name, shard in record.arrays.items()]
    read = 0
    for done, shard in enumerate(shards):
        damages += _check_shard(path, shard)
        read += shard.record.bytes
        if progress is not None:
            progress(done + 1, len(shards))
    missing = tuple(part for part in missing if part not in parts)
    return Verification(tuple(damages), len(shards), read, missing)


def _check_files(path: Path, files: dict[str, str]) -> Iterator[Damage]:
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            yield Damage(name, "the file is missing")
        elif file_digest(file) != digest:
            yield Damage(name, "the file is not what was written (sha256 differs)")


def _records(journal: Journal, damages: list[Damage]) -> Iterator[PartRecord]:
    for path in journal.paths():
        try:
            yield read_record(path)
        except CorruptError as error:
            damages.append(Damage(f"journal/{path.name}", str(error)))


def _check_shard(path: Path, shard: _Shard) -> Iterator[Damage]:
    """Damage of one shard: it is missing, cut, some chunks are wrong, or it is another shard."""
    try:
        array = CacheArray(path / "arrays.zarr" / shard.array)
    except CorruptError as error:
        yield Damage(f"arrays.zarr/{shard.array}/zarr.json", str(error), shard.array)
        return
    layout = array.layout
    file = f"arrays.zarr/{shard.array}/{layout.shard_key(shard.number)}"
    first = shard.number * layout.shard_rows
    last = min(first + layout.shard_rows, layout.shape[0])

    def damage(message: str, start: int = first, stop: int = last) -> Damage:
        return Damage(file, message, shard.array, start, stop)

    try:
        damaged, combined = array.shard(shard.number).damaged_chunks(last - first)
    except CorruptError as error:
        yield damage(str(error))
        return
    for chunk in damaged:
        start = first + chunk * layout.chunk_rows
        yield damage(
            "a chunk does not match its checksum", start, min(start + layout.chunk_rows, last)
        )
    if not damaged and (path / file).stat().st_size != shard.record.bytes:
        yield damage("the shard has another size than when it was committed")
    elif not damaged and combined != shard.record.crc32c:
        yield damage("this is not the shard that was committed")
