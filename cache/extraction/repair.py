"""Mends a damaged cache: only the damaged parts go through the model again."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks.reference_rows import check_reference_rows
from ..errors import CorruptError, MismatchError, ModelError
from ..files.json_files import file_digest, write_atomically
from ..files.leases import lease_part
from ..format.array_writer import create_part_array
from ..format.dtypes import STORED_DTYPES
from ..format.journal import Journal
from ..format.layout import array_key, array_name
from ..format.manifest import Manifest
from ..forward.part_runner import PartRunner
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.lineage import open_ancestor
from ..store.local_origin import read_origin
from ..store.verify import Damage, verify
from .resolve import describe, differing_fields

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Repair:
    """What `repair` did."""

    mended: tuple[str, ...]
    """Files that are as they were again."""
    changed: tuple[str, ...]
    """Files written anew that differ from the first ones; their new digests are in the journal."""
    left: tuple[Damage, ...]
    """Damage that only a new extraction can mend."""

    @property
    def ok(self) -> bool:
        return not self.left

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua repair`."""
        return {"ok": self.ok, **asdict(self)}


def repair(
    path: Path, model: str | None = None, device: str = "auto",
    progress: StageProgress | None = None,
    trust_remote_code: bool = False,
) -> Repair:  # fmt: skip
    """Verify the cache at `path` and write its damaged shards, head and metadata anew.

    `model` is where the model is now, if it has moved; code of its own runs only if
    `trust_remote_code`. Raises `MismatchError` if it is another
    model, `CorruptError` if the manifest itself is damaged. Tokens cannot be mended.
    """
    found = verify(path, progress and (lambda done, total: progress("verify", done, total)))
    if found.ok:
        return Repair((), (), ())
    manifest = Manifest.read(path / "manifest.json")
    mended = _copy_metadata(path, found.damages)
    mended += _make_metadata(path, manifest, found.damages, mended)
    wrong = [damage for damage in found.damages if damage.file not in mended]
    if any(_is_of_part(d) or d.file.startswith("head/") for d in wrong):
        source, loaded = _load(path, manifest, model, device, trust_remote_code)
        mended += _rebuild_head(path, source, loaded, manifest, wrong)
        again, changed = _rewrite_shards(path, loaded, wrong, progress)
        mended += again
    else:
        changed = []
    done = {*mended, *changed}
    left = tuple(damage for damage in wrong if damage.file not in done)
    return Repair(tuple(mended), tuple(changed), left)


def _is_of_part(damage: Damage) -> bool:
    array = damage.array or ""
    return array.startswith(("residual/", "logits/")) and damage.start is not None


def _copy_metadata(path: Path, damages: tuple[Damage, ...]) -> list[str]:
    """Metadata of an array from another array's file with the same digest."""
    _, files = Journal(path / "journal").base()
    mended = []
    for name in dict.fromkeys(d.file for d in damages if d.file.endswith("/zarr.json")):
        twins = [twin for twin, digest in files.items() if digest == files.get(name)]
        for twin in twins:
            if twin != name and (path / twin).is_file() and file_digest(path / twin) == files[name]:
                _replace(path / twin, path / name)
                mended.append(name)
                break
    return mended


def _make_metadata(
    path: Path, manifest: Manifest, damages: tuple[Damage, ...], mended: list[str]
) -> list[str]:
    """Metadata of arrays that have no like, made anew in each dtype that they may have."""
    _, files = Journal(path / "journal").base()
    again = []
    names = {d.file for d in damages if d.file.endswith("/zarr.json")} - set(mended)
    for name in sorted(names):
        array = name.removeprefix("arrays.zarr/").removesuffix("/zarr.json")
        for dtype in STORED_DTYPES:
            with tempfile.TemporaryDirectory(prefix="residua-") as folder:
                create_part_array(Path(folder), manifest, array, dtype)
                fresh = Path(folder) / array / "zarr.json"
                if fresh.is_file() and file_digest(fresh) == files.get(name):
                    _replace(fresh, path / name)
                    again.append(name)
                    break
    return again


def _replace(source: Path, target: Path) -> None:
    write_atomically(target, source.read_bytes())


def _load(
    path: Path, manifest: Manifest, model: str | None, device: str, trust_remote_code: bool
) -> tuple[ModelSource, "torch.nn.Module"]:
    from ..model.load_model import choose_device, load_model

    name = model or read_origin(path).get("model", manifest.model_name)
    try:
        source = ModelSource.locate(name, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{error}; say where the model is with --model") from None
    if manifest.model.code is not None and not trust_remote_code:
        raise ModelError(
            f"the model of this cache ran code of its own; repair with --trust-remote-code to run "
            f"that of {source.name} again"
        )
    identity = source.identity_for_format(manifest.format)
    if identity != manifest.model:
        differences = differing_fields(asdict(identity), asdict(manifest.model))
        raise MismatchError(
            f"{source.name} is not the model of this cache ({describe(differences)}); say where "
            "the model is with --model"
        )
    attention = manifest.capture.attention
    return source, load_model(source, choose_device(device), attention, trust_remote_code)


def _rebuild_head(
    path: Path,
    source: ModelSource,
    model: "torch.nn.Module",
    manifest: Manifest,
    damages: list[Damage],
) -> list[str]:
    """Files of `head/` made from the model again, where they come out as they were."""
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
    canary = check_model(model, stream, manifest.capture.compute_dtype, manifest.capture.dtype)
    _, files = cache.journal.base()
    mended = []
    with tempfile.TemporaryDirectory(prefix="residua-") as folder:
        save_head_and_tokenizer(Path(folder), source, canary, manifest.format)
        save_reference_rows(canary.stack, stream, Path(folder))
        for name in names:
            fresh = Path(folder) / Path(name).name
            if fresh.is_file() and file_digest(fresh) == files.get(name):
                _replace(fresh, path / name)
                mended.append(name)
    return mended


def _rewrite_shards(
    path: Path, model: "torch.nn.Module", damages: list[Damage], progress: StageProgress | None
) -> tuple[list[str], list[str]]:
    """Run the damaged parts again; files that came out as they were, and files that did not."""
    from ..checks.model_checks import recheck_model

    wanted: dict[int, set[str]] = {}
    cache = ActivationCache(path)
    for damage in filter(_is_of_part, damages):
        assert damage.array is not None
        assert damage.start is not None
        part = damage.start // cache.manifest.layout.part_rows
        wanted.setdefault(part, set()).add(damage.array)
    if not wanted:
        return [], []
    stack = recheck_model(model, cache)
    check_reference_rows(stack, path, cache.manifest.capture.compute_dtype)
    runner = PartRunner(cache, stack, open_ancestor(cache))
    mended, changed = [], []
    before = cache.journal.parts()
    for number, (part, names) in enumerate(sorted(wanted.items())):
        # In the order in which a part is written: the first reason of a quarantine holds.
        keys = tuple(array_key(name) for name in cache.target_names if name in names)
        with lease_part(path / "leases", part) as mine:
            if not mine:
                raise CorruptError(f"part {part} is being written by another process; wait for it")
            for _ in runner.write_part(part, keys, before[part], mine):
                pass
        after = cache.journal.parts()[part]
        for name in map(array_name, keys):
            file = f"arrays.zarr/{name}/{cache.array(name).layout.shard_key(part)}"
            same = after.arrays[name] == before[part].arrays[name]
            (mended if same else changed).append(file)
        if progress is not None:
            progress("repair", number + 1, len(wanted))
    return mended, changed
