"""`residua.repair`: extracts the damaged parts of a cache again and leaves all other files alone.

`store/verify.py` finds the damage. Metadata of arrays is copied or made anew, the files of `head/`
are saved from the model again, and damaged shards are written by the same `PartRunner` that an
extraction uses.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks.reference_rows import check_reference_rows
from ..errors import CorruptError
from ..files.json_files import file_digest, write_atomically
from ..files.leases import lease_part
from ..files.staging import temporary_folder
from ..format.array_writer import create_part_array
from ..format.dtypes import STORED_DTYPES
from ..format.journal import Journal
from ..format.layout import array_key, array_name
from ..format.manifest import Manifest
from ..forward.part_extraction import PartExtraction
from ..forward.part_runner import PartRunner
from ..forward.write_parts import sweep_part
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.lineage import open_ancestor
from ..store.verification import Damage, verify
from .model_reload import load_cache_model

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

    @property
    def ok(self) -> bool:
        """Whether no damage remains."""
        return not self.left

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua repair`."""
        return {"ok": self.ok, **asdict(self)}


def repair(
    path: Path,
    model: str | None = None,
    device: str = "auto",
    progress: StageProgress | None = None,
    trust_remote_code: bool = False,
) -> Repair:
    """Verify the cache at `path` and write its damaged shards, head and metadata anew.

    `model` is the present folder or hub id of the model; default the one of the extraction. Code
    that comes with the model runs only with `trust_remote_code`. `progress` is called for the
    stages `verify` and `repair` (parts). Raises `MismatchError` if the model is not the cache's,
    `CorruptError` if the manifest itself is damaged. Damaged tokens cannot be mended.
    """
    verification = verify(path, progress and (lambda done, total: progress("verify", done, total)))
    if verification.ok:
        return Repair((), (), ())

    # Metadata of arrays, without the model.
    manifest = Manifest.read(path / "manifest.json")
    mended = _copy_array_metadata(path, verification.damages)
    mended += _make_array_metadata(path, manifest, verification.damages, mended)
    damages = [damage for damage in verification.damages if damage.file not in mended]

    # Head and shards, with the model.
    changed: list[str] = []
    if any(_is_of_part(damage) or damage.file.startswith("head/") for damage in damages):
        cache = ActivationCache(path)
        source, loaded_model = load_cache_model(cache, model, device, trust_remote_code)
        mended += _mend_head(path, source, loaded_model, manifest, damages)
        mended_shards, changed = _rewrite_shards(path, loaded_model, damages, progress)
        mended += mended_shards

    return Repair(
        mended=tuple(mended),
        changed=tuple(changed),
        left=tuple(damage for damage in damages if damage.file not in {*mended, *changed}),
    )


def _is_of_part(damage: Damage) -> bool:
    """Whether the damage lies in rows of a shard that the model can compute again."""
    array = damage.array or ""
    return array.startswith(("residual/", "logits/")) and damage.start is not None


def _copy_array_metadata(path: Path, damages: tuple[Damage, ...]) -> list[str]:
    """Restore damaged `zarr.json` files from an equal file of another array; restored names."""
    _, digests = Journal(path / "journal").base()
    mended = []
    for name in dict.fromkeys(d.file for d in damages if d.file.endswith("/zarr.json")):
        twins = [twin for twin, digest in digests.items() if digest == digests.get(name)]
        for twin in twins:
            if twin == name or not (path / twin).is_file():
                continue
            with suppress(CorruptError):  # the disk fails
                if file_digest(path / twin) == digests[name]:
                    _copy_file(path / twin, path / name)
                    mended.append(name)
                    break
    return mended


def _make_array_metadata(
    path: Path, manifest: Manifest, damages: tuple[Damage, ...], mended: list[str]
) -> list[str]:
    """Make damaged `zarr.json` files anew, except the `mended` ones; restored names.

    The stored dtype of an array stands only in the damaged file, so each dtype is tried until the
    digest agrees.
    """
    _, digests = Journal(path / "journal").base()
    restored = []
    names = {d.file for d in damages if d.file.endswith("/zarr.json")} - set(mended)
    for name in sorted(names):
        array = name.removeprefix("arrays.zarr/").removesuffix("/zarr.json")
        for dtype in STORED_DTYPES:
            with temporary_folder() as folder:
                create_part_array(folder, manifest, array, dtype)
                new_file = folder / array / "zarr.json"
                if new_file.is_file() and file_digest(new_file) == digests.get(name):
                    _copy_file(new_file, path / name)
                    restored.append(name)
                    break
    return restored


def _copy_file(source: Path, target: Path) -> None:
    write_atomically(target, source.read_bytes(), sweep=True)


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
    _, digests = cache.journal.base()
    restored = []
    with temporary_folder() as folder:
        save_head_and_tokenizer(folder, source, report, manifest.format)
        save_reference_rows(report.stack, stream, folder)
        for name in names:
            new_file = folder / Path(name).name
            if new_file.is_file() and file_digest(new_file) == digests.get(name):
                _copy_file(new_file, path / name)
                restored.append(name)
    return restored


def _rewrite_shards(
    path: Path, model: "torch.nn.Module", damages: list[Damage], progress: StageProgress | None
) -> tuple[list[str], list[str]]:
    """Run the damaged parts again: shards with the recorded bytes, and shards with other bytes.

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
    if not arrays_of_part:
        return [], []

    # The model must still compute the rows of the undamaged parts.
    stack = recheck_model(model, cache)
    check_reference_rows(stack, path, cache.manifest.capture.compute_dtype)

    runner = PartRunner(cache, stack, open_ancestor(cache))
    mended, changed = [], []
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
                extraction.commit(expected=old_records[part])
        new_record = cache.journal.parts()[part]
        for name in map(array_name, keys):
            file = f"arrays.zarr/{name}/{cache.array(name).layout.shard_key(part)}"
            is_same = new_record.arrays[name] == old_records[part].arrays[name]
            (mended if is_same else changed).append(file)
        if progress is not None:
            progress("repair", number + 1, len(arrays_of_part))
    return mended, changed
