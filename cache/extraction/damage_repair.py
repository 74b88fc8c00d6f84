"""`residua.repair`: extracts the damaged parts of a cache again and leaves all other files alone.

`store/verification.py` finds the damage. Records of the journal are made again from what is whole
(`record_repair.py`), metadata of arrays copied or made anew, the files of `head/` saved from the
model again, and damaged shards written by the same `PartRunner` that an extraction uses.
"""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks.reference_rows import check_reference_rows
from ..errors import CorruptError, ResiduaError
from ..files.confined_files import confined_digest, confined_path, read_confined
from ..files.json_files import file_digest, write_atomically
from ..files.leases import lease_part
from ..files.paths import as_path, is_remote, list_folder
from ..files.staging import temporary_folder
from ..format.array_writer import create_part_array, create_table
from ..format.dtypes import STORED_DTYPES
from ..format.journal import ShardRecord
from ..format.layout import array_key, array_name
from ..format.manifest import Manifest
from ..forward.part_extraction import PartExtraction
from ..forward.part_runner import PartRunner
from ..forward.write_parts import sweep_part
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import FOLDERS, ActivationCache
from ..store.checked_arrays import LABEL_DTYPES, LABELS, TABLE_DTYPES, array_of_metadata
from ..store.lineage import open_ancestor
from ..store.verification import Damage, Verification, read_journal, target_names, verify
from .model_reload import hold_cache_model
from .record_repair import rebuild_base_records, rebuild_part_records

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Repair:
    """Files that `repair` restored or changed, and the damage that remains."""

    mended: tuple[str, ...]
    """Files restored to the recorded bytes."""
    changed: tuple[str, ...]
    """Files written anew with other bytes; the journal has their new digests."""
    left: tuple[Damage, ...]
    """Damage that only a new extraction can mend."""
    rebuilt: tuple[str, ...] = ()
    """Records of the journal made again from whole files and shards, and shards written anew
    whose record was lost: nothing says what their bytes were."""
    removed: tuple[str, ...] = ()
    """Damaged folders of kept moments; the next fit computes them again."""
    missing_parts: tuple[int, ...] = ()
    """Parts that lack an array: the same extraction as before goes on with them."""

    @property
    def ok(self) -> bool:
        """Whether no damage remains."""
        return not self.left

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua repair`."""
        return {"ok": self.ok, **asdict(self)}


def repair(
    path: str | Path,
    model: "str | Path | torch.nn.Module | None" = None,
    device: str = "auto",
    progress: StageProgress | None = None,
    trust_remote_code: bool = False,
    *,
    tokenizer: Any = None,
) -> Repair:
    """Verify the cache at `path` and write its damaged records, shards, head and metadata anew.

    `model` is the present folder or hub id of the model, or the loaded model itself with its
    `tokenizer`; default the one of the extraction. A cache of a loaded model needs it again
    (`ModelError`). Code that comes with the model runs only with `trust_remote_code`. `progress` is
    called for the stages `verify` and `repair` (parts). Raises `MismatchError` if the model is not
    the cache's, `CorruptError` if the manifest itself is damaged. Damaged tokens cannot be mended.
    Nothing is written outside the folder of the cache, and nothing through a link in it.
    """
    path = as_path(path)
    stage = progress and (lambda done, total: progress("verify", done, total))
    verification = verify(path, stage)
    if verification.ok:
        return Repair((), (), ())
    for damage in verification.damages:
        if damage.file == "manifest.json":
            raise CorruptError(
                f"{damage.message}; nothing else in the cache says all that the manifest said: if "
                "it is damaged or lost, the same `residua extract` as before makes it again and "
                "keeps the shards"
            )
    if any(damage.file in FOLDERS and damage.file != "moments" for damage in verification.damages):
        return Repair((), (), verification.damages)  # a link in place of a folder
    manifest = Manifest.read(path / "manifest.json")

    # Without the model: moments, metadata of arrays and records. The shards that damaged metadata
    # or records had hidden are verified after that.
    removed = _remove_moments(path, verification)
    mended: list[str] = []
    base_records = rebuild_base_records(path, manifest, verification)
    digests = read_journal(path, manifest).base.files
    mended += _copy_array_metadata(path, digests, verification.damages)
    mended += _make_array_metadata(path, manifest, digests, verification.damages, mended)
    if mended or base_records.names:
        verification = verify(path, stage)
    part_records = rebuild_part_records(path, manifest, verification)
    rebuilt = [*base_records.names, *part_records.names]
    lost = [*base_records.lost, *part_records.lost]
    if part_records.names:
        verification = verify(path, stage)
    damages = [damage for damage in verification.damages if damage.file not in mended]
    damages += [damage for damage in lost if all(damage.file != d.file for d in damages)]
    damages = [d for d in damages if not d.file.startswith(tuple(f"{name}/" for name in removed))]

    # Head and shards, with the model.
    changed: list[str] = []
    if any(_is_of_part(damage) or damage.file.startswith("head/") for damage in damages):
        cache = ActivationCache(path)
        with hold_cache_model(cache, model, device, trust_remote_code, tokenizer) as held:
            mended += _mend_head(path, *held, manifest, damages)
            shards = _rewrite_shards(path, held[1], damages, progress)
        mended += shards.same
        changed += shards.different
        rebuilt += shards.unrecorded

    done = {*mended, *changed, *rebuilt}
    contents = read_journal(path, manifest)
    names, parts = target_names(manifest, contents), contents.parts
    missing_parts = [
        part
        for part in verification.missing_parts
        if part not in parts or names - parts[part].arrays.keys()
    ]
    return Repair(
        mended=tuple(mended),
        changed=tuple(changed),
        left=tuple(damage for damage in damages if damage.file not in done),
        rebuilt=tuple(rebuilt),
        removed=tuple(removed),
        missing_parts=tuple(missing_parts),
    )


def _remove_moments(path: Path, verification: Verification) -> list[str]:
    """Remove the folders of damaged moments; their names inside the cache."""
    files = [damage.file for damage in verification.damages]
    names = ["/".join(file.split("/")[:2]) for file in files if file.startswith("moments/")]
    removed = []
    for name in dict.fromkeys(names):
        folder = confined_path(path, f"{name}/x").parent if not _is_link(path / name) else None
        if folder is None:
            (path / name).unlink()
        elif is_remote(folder):
            for file in list_folder(folder):
                file.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)
        removed.append(name)
    return removed


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _is_of_part(damage: Damage) -> bool:
    """Whether the damage lies in rows of a shard that the model can compute again."""
    array = damage.array or ""
    return array.startswith(("residual/", "logits/")) and damage.start is not None


def _copy_array_metadata(
    path: Path, digests: dict[str, str], damages: Iterable[Damage]
) -> list[str]:
    """Restore damaged `zarr.json` files from an equal file of another array; restored names.

    `digests` is name -> sha256 of all files that the base records name.
    """
    mended = []
    for name in dict.fromkeys(d.file for d in damages if d.file.endswith("/zarr.json")):
        twins = [twin for twin, digest in digests.items() if digest == digests.get(name)]
        for twin in twins:
            if twin != name and _digest_or_none(path, twin) == digests[name]:
                if _write_file(path, name, read_confined(path, twin)):
                    mended.append(name)
                break
    return mended


def _make_array_metadata(
    path: Path,
    manifest: Manifest,
    digests: dict[str, str],
    damages: Iterable[Damage],
    mended: list[str],
) -> list[str]:
    """Make damaged `zarr.json` files anew, except the `mended` ones; restored names.

    The stored dtype of an array stands only in the damaged file, so each dtype is tried until the
    digest agrees.
    """
    restored = []
    names = {d.file for d in damages if d.file in digests} - set(mended)
    for name in sorted(names):
        array = array_of_metadata(name)
        for dtype in () if array is None else _possible_dtypes(array):
            assert array is not None
            with temporary_folder() as folder:
                _create_array(folder, manifest, array, dtype)
                new_file = folder / array / "zarr.json"
                if new_file.is_file() and file_digest(new_file) == digests[name]:
                    if _write_file(path, name, new_file.read_bytes()):
                        restored.append(name)
                    break
    return restored


def _possible_dtypes(array: str) -> tuple[str, ...]:
    """Dtypes that the array may have; empty for one whose length the manifest does not say."""
    if array.startswith(("residual/", "logits/")):
        return tuple(STORED_DTYPES)
    if array.startswith(LABELS):
        return LABEL_DTYPES
    return TABLE_DTYPES.get(array, ()) if array.startswith(("tokens/", "sequences/")) else ()


def _create_array(store: Path, manifest: Manifest, array: str, dtype: str) -> None:
    """Create the empty array of the cache of `manifest` in the group `store`."""
    if array.startswith(("residual/", "logits/")):
        create_part_array(store, manifest, array, dtype)
        return
    tokens = manifest.tokens
    length = tokens.positions if array.startswith("tokens/") else tokens.sequences
    create_table(store, array, length, dtype)


def _digest_or_none(path: Path, name: str) -> str | None:
    """Hex sha256 of the file `name` of the cache; None if it is no file that can be read."""
    try:
        return confined_digest(path, name)
    except (ResiduaError, OSError):
        return None


def _write_file(path: Path, name: str, data: bytes) -> bool:
    """Write the file `name` of the cache anew; False if a link or a folder is in the way."""
    try:
        target = confined_path(path, name)
    except CorruptError:
        return False
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, data)
    return True


def _mend_head(
    path: Path,
    source: ModelSource,
    model: "torch.nn.Module",
    manifest: Manifest,
    damages: list[Damage],
) -> list[str]:
    """Save damaged files of `head/` from the model again; restored names.

    A file is replaced only by one with the recorded digest.
    """
    from ..checks.model_checks import check_model
    from ..checks.reference_rows import save_reference_rows
    from ..tokens.token_stream import TokenStream
    from .prepare import save_head_and_tokenizer

    names = [damage.file for damage in damages if damage.file.startswith("head/")]
    if not names:
        return []
    cache = ActivationCache(path)
    lengths = cache.contexts.length
    stream = TokenStream(cache.contexts.ids, lengths, np.arange(len(lengths)))
    report = check_model(model, stream, manifest.capture.compute_dtype, manifest.capture.dtype)
    digests = cache.journal.base()[1]
    restored = []
    with temporary_folder() as folder:
        save_head_and_tokenizer(folder, source, report, manifest.format)
        save_reference_rows(report.stack, stream, folder)
        for name in names:
            new_file = folder / Path(name).name
            is_same = new_file.is_file() and file_digest(new_file) == digests.get(name)
            if is_same and _write_file(path, name, new_file.read_bytes()):
                restored.append(name)
    return restored


@dataclass
class RewrittenShards:
    """Shards that were written anew, by what their records say of their bytes."""

    same: list[str]
    """With the recorded bytes."""
    different: list[str]
    """With other bytes."""
    unrecorded: list[str]
    """Without a record to compare with."""


def _rewrite_shards(
    path: Path, model: "torch.nn.Module", damages: list[Damage], progress: StageProgress | None
) -> RewrittenShards:
    """Run the damaged parts again and write their damaged shards anew.

    Other bytes come from other hardware or versions, within the rounding that
    `check_reference_rows` allows.
    """
    from ..checks.model_checks import recheck_model

    # Damaged arrays of each part.
    cache = ActivationCache(path)
    arrays_of_part: dict[int, set[str]] = {}
    for damage in filter(_is_of_part, damages):
        assert damage.array is not None
        assert damage.start is not None
        part = damage.start // cache.manifest.layout.part_rows
        arrays_of_part.setdefault(part, set()).add(damage.array)
    rewritten = RewrittenShards([], [], [])
    if not arrays_of_part:
        return rewritten

    # The model must still compute the rows of the undamaged parts.
    stack = recheck_model(model, cache)
    check_reference_rows(stack, path, cache.manifest.capture.compute_dtype)

    runner = PartRunner(cache, stack, open_ancestor(cache))
    old_records = cache.journal.parts()
    for number, (part, names) in enumerate(sorted(arrays_of_part.items())):
        # In the order of an extraction: the first reason of a quarantine is the recorded one.
        keys = tuple(array_key(name) for name in cache.target_names if name in names)
        with lease_part(path / "leases", part) as lease:
            if not lease:
                raise CorruptError(f"part {part} is being written by another process; wait for it")
            sweep_part(cache, part)
            with PartExtraction(runner, part, keys, lease) as extraction:
                for _ in extraction.write_batches():
                    pass
                extraction.commit(expected=old_records.get(part))
        new_record = cache.journal.parts()[part]
        for name in map(array_name, keys):
            file = f"arrays.zarr/{name}/{cache.array(name).layout.shard_key(part)}"
            old_shard = old_records[part].arrays.get(name) if part in old_records else None
            if old_shard is None:
                rewritten.unrecorded.append(file)
            elif _is_same(new_record.arrays[name], old_shard):
                rewritten.same.append(file)
            else:
                rewritten.different.append(file)
        if progress is not None:
            progress("repair", number + 1, len(arrays_of_part))
    return rewritten


def _is_same(new: ShardRecord, old: ShardRecord) -> bool:
    """Whether two records name the same bytes; a rebuilt record has another `absmax`."""
    return (new.bytes, new.crc32c) == (old.bytes, old.crc32c)
