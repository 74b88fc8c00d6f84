"""Verifies a cache: reads every file, and names the damaged files, arrays and rows.

`verify` is the public function (`residua verify`). `repair` extracts the damaged parts again, and
caches are verified before `push` and after `pull`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError, NotFoundError, ResiduaError, UnreachableError
from ..files.confined_files import check_folders, check_regular, confined_digest
from ..files.paths import is_remote, list_folder
from ..format.journal import (
    BaseRecord,
    Journal,
    PartRecord,
    ShardRecord,
    merge_records,
    record_name,
    record_number,
)
from ..format.layout import ArrayLayout
from ..format.logits_arrays import list_logits_arrays
from ..format.manifest import Manifest
from ..progress import Progress
from .activation_cache import FOLDERS
from .checked_arrays import (
    GROUP,
    ArrayMetadata,
    CheckedArray,
    array_of_metadata,
    metadata_file,
    named_layers,
)
from .moment_files import damaged_moments

TOKEN_IDS = "tokens/ids"


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
    """Parts whose records lack an array: their extraction, or that of a layer, is not finished."""
    lost_records: tuple[str, ...] = ()
    """Records without which whole shards of a part are no data: lost, or never written because
    the writer was killed just before; `repair` makes them again."""

    @property
    def ok(self) -> bool:
        """Whether no damage was found and no record lost; parts may be missing all the same."""
        return not self.damages and not self.lost_records

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

    `progress(done, total)` counts shards. Every byte is read once. Damage is returned, not raised:
    a file that the disk cannot read, a link, or a record that is no such record is damage too.
    """
    damages: list[Damage] = []
    for folder in FOLDERS:
        with _collecting(damages, folder):
            check_folders(path, (folder,))

    # The manifest says how many parts the cache has, the base records which files, and the digests
    # of these; commit records name the shards of committed parts.
    manifest = _read_manifest(path, damages)
    contents = read_journal(path, manifest, damages)
    damages += _check_files(path, contents.base.files, {damage.file for damage in damages})
    damages += _unnamed_layers(path, contents)

    # Every shard, of arrays that are written whole and of parts.
    shards = list(_recorded_shards(contents))
    n_bytes = 0
    has_bases = not any(damage.file.startswith("journal/base") for damage in damages)
    if manifest is not None:
        # Without all base records, arrays are checked against the manifest alone.
        files = None if has_bases else contents.base.files
        arrays = _Arrays(ArrayMetadata(path, manifest, contents.journal, files), damages)
        damages += _check_tables(arrays, contents.base) if has_bases else ()
        for done, shard in enumerate(shards, 1):
            damages += _check_shard(arrays, shard)
            n_bytes += shard.record.bytes
            if progress is not None:
                progress(done, len(shards))
    with _collecting(damages, "moments"):
        damages += [Damage(file, message) for file, message in damaged_moments(path)]

    missing_parts: tuple[int, ...] = ()
    lost_records: list[str] = []
    # The number of parts may be a stranger's, until as many tokens are there.
    has_tokens = has_bases and not any(_is_about_tokens(damage) for damage in damages)
    if manifest is not None and has_tokens:
        names = target_names(manifest, contents)
        parts, n_parts = contents.parts, manifest.layout.parts(manifest.tokens.positions)
        missing_parts = tuple(
            part
            for part in range(n_parts)
            if part not in parts or not parts[part].arrays.keys() >= names
        )
        lost_records = _lost_records(path, names, contents, missing_parts)
    return Verification(
        damages=tuple(dict.fromkeys(damages)),
        shards=len(shards),
        bytes=n_bytes,
        missing_parts=missing_parts,
        # A writer that was at work may have written its record meanwhile.
        lost_records=tuple(name for name in lost_records if not (path / name).exists()),
    )


class _collecting:
    """A context that turns what is wrong with `file` into a `Damage`."""

    def __init__(self, damages: list[Damage], file: str) -> None:
        self._damages, self._file = damages, file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, ResiduaError | OSError):
            return False
        self._damages.append(Damage(self._file, damage_message(error)))
        return True


def damage_message(error: Exception) -> str:
    """What `error` says of a damaged file; for an error of the disk, the system's words."""
    if isinstance(error, ResiduaError) or not isinstance(error, OSError):
        return str(error)
    return f"the disk cannot read the file ({(error.strerror or str(error)).lower()})"


def _read_manifest(path: Path, damages: list[Damage]) -> Manifest | None:
    """The manifest; None, and a damage, if it is missing or damaged."""
    with _collecting(damages, "manifest.json"):
        try:
            check_regular(path, "manifest.json")
            return Manifest.read(path / "manifest.json")
        except FileNotFoundError:
            raise NotFoundError("the manifest is missing") from None
    return None


@dataclass
class JournalContents:
    """The readable records of a journal, and the names of damaged and missing records."""

    journal: Journal
    records: dict[str, PartRecord] = field(default_factory=dict)
    """Name of the file -> commit record, in their order."""
    bases: dict[str, BaseRecord] = field(default_factory=dict)
    """Name of the file -> base record, in their order."""
    damaged: list[str] = field(default_factory=list)
    """Names of records that are damaged, or missing before a later one."""

    @property
    def parts(self) -> dict[int, PartRecord]:
        """Part -> its readable records, merged."""
        return merge_records(self.records.values())

    @property
    def base(self) -> BaseRecord:
        """The readable base records, merged."""
        arrays, files = {}, {}
        for record in self.bases.values():
            arrays |= record.arrays
            files |= record.files
        return BaseRecord(arrays, files)

    @property
    def damaged_parts(self) -> dict[int, list[str]]:
        """Part -> names of its damaged or missing records."""
        names: dict[int, list[str]] = {}
        for name in self.damaged:
            if not name.startswith("base"):
                names.setdefault(int(record_number(name)[0]), []).append(name)
        return names


def read_journal(
    path: Path, manifest: Manifest | None, damages: list[Damage] | None = None
) -> JournalContents:
    """Read all records of the cache at `path`; what is wrong with any is added to `damages`."""
    damages = [] if damages is None else damages
    journal = Journal(path / "journal", manifest)
    contents = JournalContents(journal)
    try:
        check_folders(path, ("journal",))
        names = [file.name for file in (*journal.base_paths(), *journal.paths())]
    except (CorruptError, OSError) as error:
        damages.append(Damage("journal", damage_message(error)))
        return contents

    # Records are numbered without gaps: one before the last of a part, or of the base, is lost.
    last_number: dict[str, int] = {"base": 0}
    for stem, number in map(record_number, names):
        last_number[stem] = max(last_number.get(stem, 0), number)
    # A number beyond all reason is no gap of that many records.
    last_number = {stem: min(number, len(names)) for stem, number in last_number.items()}
    expected = [record_name(stem, n) for stem, last in last_number.items() for n in range(last + 1)]
    for name in sorted({*names, *expected}, key=record_number):
        file = f"journal/{name}"
        try:
            if name.startswith("base"):
                contents.bases[name] = journal.read_base(name)
            else:
                contents.records[name] = journal.read_record(name)
        except UnreachableError:
            raise
        except (ResiduaError, OSError) as error:
            contents.damaged.append(name)
            damages.append(Damage(file, damage_message(error)))
    return contents


def target_names(manifest: Manifest, contents: JournalContents) -> set[str]:
    """Arrays that every part has or is meant to get: layers that base records name, and logits."""
    layers = {f"residual/{layer}" for layer in named_layers(contents.base.files, manifest.depth)}
    logits = list_logits_arrays(manifest.capture.logits, manifest.vocab, "float16")
    return {*layers, *(array.name for array in logits)}


def _check_files(path: Path, files: dict[str, str], named: set[str]) -> Iterator[Damage]:
    """Damage of the files that the base records name, name -> sha256; not of those in `named`."""
    for name, digest in files.items():
        if name in named:
            continue
        try:
            if confined_digest(path, name) != digest:
                yield Damage(name, "the file is not what was written (sha256 differs)")
        except FileNotFoundError:
            yield Damage(name, "the file is missing")
        except (CorruptError, OSError) as error:
            yield Damage(name, damage_message(error))


def _unnamed_layers(path: Path, contents: JournalContents) -> Iterator[Damage]:
    """Layers with shards whose metadata no base record names: that record is lost.

    A writer adds the base record before the first shard, so that a killed one leaves no such layer.
    """
    if any(name.startswith("base") for name in contents.damaged):
        return  # said already
    names = {name for record in contents.records.values() for name in record.arrays}
    names |= {f"residual/{layer}" for layer in layers_with_shards(path)}
    files = contents.base.files
    lost = sorted(name for name in names if metadata_file(name) not in files)
    if lost:
        record = record_name("base", len(contents.bases))
        yield Damage(
            f"journal/{record}",
            f"the record is lost: no base record names the metadata of {', '.join(lost[:8])}",
        )


def layers_with_shards(path: Path) -> list[int]:
    """Layers with a folder of shards on disk, whether or not the journal names them."""
    residual = path / GROUP / "residual"
    if is_remote(path) or residual.is_symlink():
        return []
    layers = []
    for folder in list_folder(residual):
        if folder.name.isascii() and folder.name.isdecimal() and len(folder.name) < 10:
            shards = folder / "c"
            if not folder.is_symlink() and not shards.is_symlink() and list_folder(shards):
                layers.append(int(folder.name))
    return sorted(layers)


def _lost_records(
    path: Path, names: set[str], contents: JournalContents, missing_parts: tuple[int, ...]
) -> list[str]:
    """Names of the missing records of parts whose shards are all there.

    `names` are the arrays that every part should have.
    """
    parts, damaged_parts = contents.parts, contents.damaged_parts
    lost = []
    for part in missing_parts:
        unnamed = names - (parts[part].arrays.keys() if part in parts else set())
        if part not in damaged_parts and has_shards(path, sorted(unnamed), part):
            numbers = [n for n in contents.records if n.startswith(f"{part:08d}.")]
            lost.append(f"journal/{record_name(f'{part:08d}', len(numbers))}")
    return lost


def _is_about_tokens(damage: Damage) -> bool:
    """Whether token ids are missing, so that nobody knows how many parts the cache has."""
    return damage.array == TOKEN_IDS or damage.file in (
        metadata_file(TOKEN_IDS),
        "manifest.json",
        "arrays.zarr",
    )


def has_shards(path: Path, names: Iterable[str], part: int) -> bool:
    """Whether the files of shard `part` of all arrays `names` are there."""
    return all((path / shard_file(name, part)).exists() for name in names)


def shard_file(name: str, part: int) -> str:
    """Name inside the cache of shard `part` of a residual or logits array."""
    is_flat = name in ("logits/logsumexp", "logits/tail")
    return f"{GROUP}/{name}/c/{part}" if is_flat else f"{GROUP}/{name}/c/{part}/0"


def _recorded_shards(contents: JournalContents) -> Iterator[_RecordedShard]:
    """All shards that the journal names."""
    for name, shards in contents.base.arrays.items():
        for number, record in shards.items():
            yield _RecordedShard(name, int(number), record)
    for part, record in contents.parts.items():
        for name, shard in record.arrays.items():
            yield _RecordedShard(name, part, shard)


class _Arrays:
    """The arrays of the cache, each opened once; `damages` gets those that cannot be opened."""

    def __init__(self, metadata: ArrayMetadata, damages: list[Damage]) -> None:
        self.path = metadata.path
        self._metadata, self._damages = metadata, damages
        self._arrays: dict[str, CheckedArray | None] = {}

    def open(self, name: str) -> CheckedArray | None:
        """The array `name`; None, and a damage, if its metadata are damaged."""
        if name not in self._arrays:
            self._arrays[name] = None
            file = metadata_file(name)
            if any(damage.file == file for damage in self._damages):
                return None  # said already
            with _collecting(self._damages, file):
                self._arrays[name] = CheckedArray(self._metadata, name)
        return self._arrays[name]


def _check_tables(arrays: _Arrays, base: BaseRecord) -> Iterator[Damage]:
    """Arrays that are written whole: do the base records name exactly their shards?"""
    for name in {TOKEN_IDS, *filter(None, map(array_of_metadata, base.files))}:
        if name.startswith(("residual/", "logits/")) or (array := arrays.open(name)) is None:
            continue
        numbers, expected = base.arrays.get(name, {}).keys(), array.layout.shards
        if len(numbers) != expected or any(int(number) >= expected for number in numbers):
            yield Damage(
                "journal/base.json",
                f"{len(numbers)} shards of {name} are named; the array has {expected}",
                name,
            )


def _check_shard(arrays: _Arrays, shard: _RecordedShard) -> Iterator[Damage]:
    """Damage of one shard: missing, cut, with wrong chunks, or not the shard that was recorded."""
    array = arrays.open(shard.array)
    if array is None or shard.number >= array.layout.shards:
        return  # said already
    layout: ArrayLayout = array.layout
    file = f"{GROUP}/{shard.array}/{layout.shard_key(shard.number)}"
    first = shard.number * layout.shard_rows
    end = min(first + layout.shard_rows, layout.shape[0])

    def damage(message: str, start: int = first, stop: int = end) -> Damage:
        return Damage(file, message, shard.array, start, stop)

    try:
        damaged_chunks, crc32c = array.shard(shard.number).damaged_chunks(end - first)
        size = (arrays.path / file).stat().st_size
    except (CorruptError, OSError) as error:
        yield damage(damage_message(error))
        return
    finally:
        array.close_shard(shard.number)
    for chunk, reason in damaged_chunks.items():
        start = first + chunk * layout.chunk_rows
        stop = min(start + layout.chunk_rows, end)
        yield damage(reason, start, stop)

    # All chunks are whole: is this the shard that was committed?
    if not damaged_chunks and size != shard.record.bytes:
        yield damage("the shard has another size than when it was committed")
    elif not damaged_chunks and crc32c != shard.record.crc32c:
        yield damage("this is not the shard that was committed")
