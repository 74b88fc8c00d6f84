"""Verifies a cache: reads every file, and names the damaged files, arrays and rows.

`verify` is the public function (`residua verify`). `repair` extracts the damaged parts again, and
caches are verified before `push` and after `pull`.
"""

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
    """A file, or rows of an array, that differ from what was written."""

    file: str
    """Path inside the cache."""
    message: str
    array: str | None = None
    """Name of the array, such as `residual/3`."""
    start: int | None = None
    """First damaged row of the array."""
    stop: int | None = None
    """Last damaged row + 1."""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`."""

    damages: tuple[Damage, ...]
    shards: int
    """Number of shards read."""
    bytes: int
    """Bytes of these shards."""
    missing_parts: tuple[int, ...]
    """Parts without a record in the journal: the extraction is not finished."""

    @property
    def ok(self) -> bool:
        """Whether no damage was found; parts may be missing all the same."""
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua verify`."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class _RecordedShard:
    """A shard that the journal records."""

    array: str
    number: int
    record: ShardRecord


def verify(path: Path, progress: Progress | None = None) -> Verification:
    """Check every file of the cache in the folder `path` against its digest or checksums.

    `progress(done, total)` counts shards. Every byte is read once. Damage is
    returned, not raised.
    """
    damages: list[Damage] = []
    journal = Journal(path / "journal")
    shards: list[_RecordedShard] = []

    # The manifest says how many parts the cache has.
    parts = range(0)
    try:
        manifest = Manifest.read(path / "manifest.json")
        parts = range(manifest.layout.parts(manifest.tokens.positions))
    except ResiduaError as error:
        damages.append(Damage("manifest.json", str(error)))

    # The journal names files with digests, and the shards of arrays that are written whole ...
    try:
        arrays, files = journal.base()
        damages += _check_files(path, files)
        shards += [
            _RecordedShard(name, int(number), ShardRecord(**record))
            for name, records in arrays.items()
            for number, record in records.items()
        ]
    except (ResiduaError, KeyError, TypeError) as error:
        damages.append(Damage("journal/base.json", str(error)))

    # ... and its records name the shards of committed parts.
    records = merge_records(_read_records(journal, damages))
    for part, record in records.items():
        shards += [_RecordedShard(name, part, shard) for name, shard in record.arrays.items()]

    n_bytes = 0
    for done, shard in enumerate(shards, 1):
        damages += _check_shard(path, shard)
        n_bytes += shard.record.bytes
        if progress is not None:
            progress(done, len(shards))
    missing_parts = tuple(part for part in parts if part not in records)
    return Verification(tuple(damages), len(shards), n_bytes, missing_parts)


def _check_files(path: Path, files: dict[str, str]) -> Iterator[Damage]:
    """Damage of the files that the journal names, name -> sha256."""
    for name, digest in files.items():
        file = path / name
        try:
            if not file.is_file():
                yield Damage(name, "the file is missing")
            elif file_digest(file) != digest:
                yield Damage(name, "the file is not what was written (sha256 differs)")
        except CorruptError as error:
            yield Damage(name, str(error))


def _read_records(journal: Journal, damages: list[Damage]) -> Iterator[PartRecord]:
    """Records that can be read; the others are added to `damages`."""
    for path in journal.paths():
        try:
            yield read_record(path)
        except CorruptError as error:
            damages.append(Damage(f"journal/{path.name}", str(error)))


def _check_shard(path: Path, shard: _RecordedShard) -> Iterator[Damage]:
    """Damage of one shard: missing, cut, with wrong chunks, or not the shard that was recorded."""
    try:
        array = CacheArray(path / "arrays.zarr" / shard.array)
    except CorruptError as error:
        yield Damage(f"arrays.zarr/{shard.array}/zarr.json", str(error), shard.array)
        return
    layout = array.layout
    file = f"arrays.zarr/{shard.array}/{layout.shard_key(shard.number)}"
    first = shard.number * layout.shard_rows
    end = min(first + layout.shard_rows, layout.shape[0])

    def damage(message: str, start: int = first, stop: int = end) -> Damage:
        return Damage(file, message, shard.array, start, stop)

    try:
        damaged_chunks, crc32c = array.shard(shard.number).damaged_chunks(end - first)
    except CorruptError as error:
        yield damage(str(error))
        return
    for chunk, reason in damaged_chunks.items():
        start = first + chunk * layout.chunk_rows
        stop = min(start + layout.chunk_rows, end)
        yield damage(reason, start, stop)

    # All chunks are whole: is this the shard that was committed?
    if not damaged_chunks and (path / file).stat().st_size != shard.record.bytes:
        yield damage("the shard has another size than when it was committed")
    elif not damaged_chunks and crc32c != shard.record.crc32c:
        yield damage("this is not the shard that was committed")
