"""Makes damaged and lost records of the journal again, from the files and shards that are whole.

`repair` calls `rebuild_base_records`, then `rebuild_part_records`; neither needs the model. A shard
carries checksums of its own, so that a record can be made from it; what a record alone said, the
largest |value| before the cast, becomes that of the stored values, and the record says so.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, ModelError, ResiduaError
from ..files.confined_files import (
    check_regular,
    confined_digest,
    confined_path,
    is_regular,
    read_confined,
    read_confined_json,
)
from ..files.json_fields import MAX_JSON_BYTES, parse_json_object
from ..files.json_files import json_digest, write_json
from ..files.leases import lease_part
from ..files.paths import is_remote, store_of
from ..format.journal import PartRecord, ShardRecord, record_json, record_name, record_number
from ..format.layout import array_name
from ..format.manifest import Manifest
from ..model.safetensors_header import read_header
from ..store.checked_arrays import (
    GROUP,
    ArrayMetadata,
    CheckedArray,
    array_of_metadata,
)
from ..store.verification import Damage, JournalContents, Verification, read_journal, target_names

HEAD_FILES = (
    "head.json",
    "head.safetensors",
    "tokenizer.json",
    "image_processor.json",
    "canary.safetensors",
    "config.json",
    "tokenizer_config.json",
)
"""Files that a writer puts into `head/`."""
BLOCK_ROWS = 1 << 14
"""Rows whose values are read at a time."""


@dataclass
class RebuiltRecords:
    """Records that were made again, and what no record names any more."""

    names: list[str] = field(default_factory=list)
    """Files of the records."""
    lost: list[Damage] = field(default_factory=list)
    """Shards and files that were not whole, so that no record names them."""


def rebuild_base_records(
    path: Path, manifest: Manifest, verification: Verification
) -> RebuiltRecords:
    """Make the damaged and lost base records of the cache at `path` again.

    The first one gets the digests of all files that no whole base record names and that show
    themselves to be whole: by a digest of their own, by the manifest, or by their content.
    """
    contents = read_journal(path, manifest)
    damaged = [name for name in contents.damaged if name.startswith("base")]
    damaged += [
        damage.file.removeprefix("journal/")
        for damage in verification.damages
        if damage.file.startswith("journal/base")
    ]
    damaged = sorted(set(damaged), key=record_number)
    rebuilt = RebuiltRecords()
    if not damaged:
        return rebuilt

    files: dict[str, str] = {}
    for name in sorted(_cache_files(path)):
        if name in contents.base.files:
            continue
        try:
            _check_content(path, name, manifest)
            files[name] = confined_digest(path, name)
        except (ResiduaError, OSError) as error:
            message = f"no record says what was written, and it is not whole ({error})"
            rebuilt.lost.append(Damage(name, message))

    # Shards of the arrays that are written whole.
    tables: dict[str, dict[str, Any]] = {}
    metadata = ArrayMetadata(path, manifest, contents.journal, {**contents.base.files, **files})
    for file in [*contents.base.files, *files]:
        name = array_of_metadata(file)
        if name is None or name.startswith(("residual/", "logits/")):
            continue
        try:
            array = CheckedArray(metadata, name)
        except CorruptError:
            continue  # damaged metadata, which `verify` names
        recorded = contents.base.arrays.get(name, {})
        tables[name] = {}
        for number in range(array.layout.shards):
            if str(number) in recorded:
                continue
            record = _whole_shard(array, number)
            if record is not None:
                tables[name][str(number)] = {"bytes": record.bytes, "crc32c": record.crc32c}
                continue
            shard = f"{GROUP}/{name}/{array.layout.shard_key(number)}"
            rebuilt.lost.append(Damage(shard, "no record names it, and it is not whole", name))

    # Further damaged records become empty: the first one says all that they said.
    for index, name in enumerate(damaged):
        value = {"arrays": {n: r for n, r in tables.items() if r}, "files": files}
        _replace_record(path, name, {"arrays": {}, "files": {}} if index else value)
        rebuilt.names.append(f"journal/{name}")
    return rebuilt


def rebuild_part_records(
    path: Path, manifest: Manifest, verification: Verification
) -> RebuiltRecords:
    """Make damaged and lost commit records of the cache at `path` again from whole shards.

    Shards of a damaged record that are not whole are `lost`, with their rows: the model computes
    them again. Sequences of rows that are not finite are quarantined as an extraction does.
    """
    contents = read_journal(path, manifest)
    names_of_part = contents.damaged_parts
    for file in verification.lost_records:
        name = file.removeprefix("journal/")
        names_of_part.setdefault(int(record_number(name)[0]), [])
    rebuilt = RebuiltRecords()
    for part, damaged in sorted(names_of_part.items()):
        if part >= manifest.layout.parts(manifest.tokens.positions):
            for name in damaged:  # of a part that the cache cannot have
                _remove_record(path, name)
                rebuilt.names.append(f"journal/{name}")
            continue
        with lease_part(path / "leases", part) as lease:
            if not lease:
                raise CorruptError(f"part {part} is being written by another process; wait for it")
            try:
                _rebuild_part(path, manifest, part, damaged, rebuilt)
            except (CorruptError, OSError) as error:  # a token array is damaged, or a link there
                names = damaged or [record_name(f"{part:08d}", 0)]
                rebuilt.lost += [Damage(f"journal/{name}", str(error)) for name in names]
    return rebuilt


def _rebuild_part(
    path: Path, manifest: Manifest, part: int, damaged: list[str], rebuilt: RebuiltRecords
) -> None:
    """Make the records `damaged` of `part` again; without any, a record for unnamed shards."""
    contents = read_journal(path, manifest)
    metadata = ArrayMetadata(path, manifest, contents.journal)
    records = {n: r for n, r in contents.records.items() if r.part == part}
    first_damaged = min((record_number(name)[1] for name in damaged), default=None)
    named: dict[str, tuple[int, ShardRecord]] = {}
    for name, record in records.items():
        named |= {array: (record_number(name)[1], shard) for array, shard in record.arrays.items()}

    start, stop = manifest.layout.rows(part, manifest.tokens.positions)
    shards: dict[str, ShardRecord] = {}
    quarantine: dict[int, str] = {}
    for name in _in_order(manifest, contents):
        number, recorded = named.get(name, (None, None))
        # A record of a later number than the damaged one holds in any case.
        if recorded is not None and (first_damaged is None or (number or 0) > first_damaged):
            continue
        try:
            array = CheckedArray(metadata, name)
        except CorruptError:
            continue  # damaged metadata, which `verify` names
        shard = _whole_shard(array, part)
        if recorded is not None and (shard is None or _is_same(shard, recorded)):
            continue
        if shard is None:
            file = f"{GROUP}/{name}/{array.layout.shard_key(part)}"
            message = "no record names it, and it is not whole"
            if damaged:
                rebuilt.lost.append(Damage(file, message, name, start, stop))
            continue
        shards[name] = _with_range(metadata, array, shard, (start, stop), quarantine)
    if not (shards or damaged):
        return
    if not shards:  # what the record named, later records name too; its quarantine is still needed
        for name, (_, recorded) in named.items():
            array = CheckedArray(metadata, name)
            if _whole_shard(array, part) is not None:
                _with_range(metadata, array, recorded, (start, stop), quarantine)

    record = PartRecord(part, start, stop, shards, quarantine, rebuilt=True)
    if not damaged:
        number = 1 + max((record_number(name)[1] for name in records), default=-1)
        damaged = [record_name(f"{part:08d}", number)]
    for index, name in enumerate(sorted(damaged, key=record_number)):
        empty = PartRecord(part, start, stop, rebuilt=True)
        _replace_record(path, name, record_json(empty if index else record))
        rebuilt.names.append(f"journal/{name}")


def _in_order(manifest: Manifest, contents: JournalContents) -> list[str]:
    """Names of the arrays of a part, in the order of an extraction: layers, then logits."""
    names = target_names(manifest, contents)
    layers = sorted(int(name.split("/")[1]) for name in names if name.startswith("residual/"))
    logits = sorted(name for name in names if not name.startswith("residual/"))
    return [*map(array_name, layers), *logits]


def _is_same(shard: ShardRecord, recorded: ShardRecord) -> bool:
    """Whether a shard on disk is the one that a record names."""
    return (shard.bytes, shard.crc32c) == (recorded.bytes, recorded.crc32c)


def _whole_shard(array: CheckedArray, number: int) -> ShardRecord | None:
    """Size and checksum of a shard whose chunks all match their checksums; None for any other."""
    layout = array.layout
    first = number * layout.shard_rows
    rows = min(layout.shard_rows, layout.shape[0] - first)
    try:
        damaged, crc32c = array.shard(number).damaged_chunks(rows)
        size = (array.path / layout.shard_key(number)).stat().st_size
    except (CorruptError, OSError):
        return None
    finally:
        array.close_shard(number)
    chunks = -(-rows // layout.chunk_rows)
    index_bytes = layout.shard_rows // layout.chunk_rows * 16 + 4
    if layout.raw and size != chunks * layout.chunk_bytes + index_bytes:
        return None  # bytes between the chunks
    return None if damaged else ShardRecord(size, crc32c)


def _with_range(
    metadata: ArrayMetadata,
    array: CheckedArray,
    shard: ShardRecord,
    rows: tuple[int, int],
    quarantine: dict[int, str],
) -> ShardRecord:
    """`shard` with the range of its values; sequences with others join `quarantine`."""
    if array.dtype.kind != "f":
        return shard
    start, stop = rows
    name = f"{array.path.parent.name}/{array.path.name}"
    where = f"at layer {array.path.name}" if name.startswith("residual/") else f"in {name}"
    absmax, counts = 0.0, np.zeros(stop - start, np.int64)
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        values = array.read(first, last).reshape(last - first, -1)
        finite = np.isfinite(values)
        absmax = max(absmax, float(np.abs(values, where=finite, out=np.zeros_like(values)).max()))
        counts[first - start : last - start] = (~finite).sum(-1)
    if counts.any():
        sequence_of_row = CheckedArray(metadata, "tokens/sequence").read(start, stop)
        bad_rows = np.flatnonzero(counts)
        totals = dict.fromkeys(sequence_of_row[bad_rows].tolist(), 0)
        for row in bad_rows.tolist():
            totals[int(sequence_of_row[row])] += int(counts[row])
        for sequence, total in totals.items():
            for number in _runs_of_context(metadata, sequence):
                quarantine.setdefault(number, f"{total} non-finite values {where}")
    array.close_shard(start // array.layout.shard_rows)
    return ShardRecord(shard.bytes, shard.crc32c, absmax, int(counts.sum()))


def _runs_of_context(metadata: ArrayMetadata, sequence: int) -> list[int]:
    """All sequences of the context of `sequence`: what the model read together."""
    if metadata.digest_of("sequences/context") is None:
        return [sequence]
    contexts = CheckedArray(metadata, "sequences/context")[:]
    return np.flatnonzero(contexts == contexts[sequence]).tolist()


def _cache_files(path: Path) -> Iterator[str]:
    """Names of the files on disk that base records name: metadata, head, manifest, provenance."""
    yield from ("manifest.json", "provenance.json")
    for name in HEAD_FILES:
        try:
            if is_regular(path, f"head/{name}"):
                yield f"head/{name}"
        except ResiduaError:
            yield f"head/{name}"
    if is_remote(path):
        store, key = store_of(path)
        for found in store.find(f"{key}/{GROUP}"):
            if found.endswith("/zarr.json"):
                yield found[found.index(f"/{GROUP}/") + 1 :]
        return
    for folder, folders, names in os.walk(path / GROUP, followlinks=False):
        folders[:] = [name for name in folders if name != "c" and not name.startswith(".")]
        if "zarr.json" in names:
            yield (Path(folder) / "zarr.json").relative_to(path).as_posix()


def _check_content(path: Path, name: str, manifest: Manifest) -> None:
    """Raise `CorruptError`, or another error, unless the file `name` shows itself to be whole."""
    if name == "manifest.json":
        check_regular(path, name)  # it was read already
        return
    if name in ("provenance.json", "head/head.json"):
        read_confined_json(path, name)
        return
    if name.endswith(".safetensors"):
        if name == "head/head.safetensors":
            recorded = read_confined_json(path, "head/head.json").get("tensors")
            if confined_digest(path, name) != recorded:
                raise CorruptError("it is not the file of head.json")
        elif not is_remote(path):
            check_regular(path, name)
            try:
                read_header(path / name)
            except ModelError as error:
                raise CorruptError(str(error)) from None
        return
    raw = read_confined(path, name, MAX_JSON_BYTES)
    value = parse_json_object(raw, path / name)
    if name in ("head/tokenizer.json", "head/image_processor.json") and manifest.format > 1:
        if json_digest(value) != manifest.tokens.tokenizer:
            raise CorruptError("it is not the tokenizer, or image processor, of the manifest")
    elif name.endswith("/zarr.json"):
        array = array_of_metadata(name)
        if array is not None and value.get("node_type") == "array":
            digest = hashlib.sha256(raw).hexdigest()
            CheckedArray(ArrayMetadata(path, manifest, files={name: digest}), array)
        elif value.get("node_type") != "group":
            raise CorruptError("it is the metadata of neither an array nor a group")


def _replace_record(path: Path, name: str, value: dict[str, Any]) -> None:
    """Write a record in place of a damaged one, whatever stands under its name."""
    _remove_record(path, name, keep_file=True)
    write_json(confined_path(path, f"journal/{name}"), value)


def _remove_record(path: Path, name: str, keep_file: bool = False) -> None:
    """Remove a damaged record; a folder of its name is moved aside. A rename replaces a file."""
    file = path / "journal" / name
    if not is_remote(path) and file.is_dir() and not file.is_symlink():
        file.rename(file.with_name(f".{name}.damaged"))
    elif not keep_file:
        file.unlink(missing_ok=True)
