"""Makes a new cache folder, whole or not at all, and writes its parts."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .array import CacheArray
from .decode import decode, encode
from .errors import UsageError
from .journal import Journal, PartRecord, ShardRecord
from .jsonfile import file_digest, make_folder, sync_folder, sync_tree, write_json
from .layout import Key, Layout, name_of
from .lease import FileLease, Lease, exclusive, try_lock
from .logits import arrays_of
from .manifest import Manifest
from .origin import FILE as ORIGIN
from .packed import shard_writer
from .place import TRANSFERS, is_remote, upload
from .shard import ShardWriter
from .tables import tables
from .tokens import TokenStream
from .writer import create_logits, create_residual, write_table

FP16_LIMIT = 16384.0
"""Calibrated absmax up to which a float32 or float16 layer is kept in float16."""
FP16_ROUNDING = 1.001 * 2.0**-11
"""Loss of float16, relative to a row's largest |value|, that is rounding; numbers below 6e-5, for
which float16 has fewer bits, lose more."""
LARGEST = {"float16": 65504.0, "bfloat16": 3.3961773e38}
"""Largest value that a dtype does not round to infinity (float16 would round 65519 down)."""
UNFINISHED_SECONDS = 24 * 3600.0
"""Age at which an unfinished cache is given up on where folders cannot be locked."""
FOLDERS = ("head", "journal", "leases", "moments")


def create_cache(
    root: Path,
    manifest: Manifest,
    stream: TokenStream,
    hashes: np.ndarray,
    dtypes: Mapping[int, str],
    write_head: Callable[[Path], None],
    provenance: dict,
    logits_dtype: str = "float16",
) -> Path:
    """Write manifest, head, tokens and empty arrays of the parts, then rename the folder to its id.

    A cache folder with an id therefore always has all of these; a crash leaves only a
    `.new-*` folder. If another process made the same cache meanwhile, theirs stays. For an
    object store the folder is made in the system's temporary folder, and sent.
    """
    target = root / manifest.id
    with _staging(root) as staging:
        for folder in FOLDERS:
            (staging / folder).mkdir()
        manifest.write(staging / "manifest.json")
        write_json(staging / "provenance.json", provenance)
        write_head(staging / "head")
        store = staging / "arrays.zarr"
        record = {
            name: write_table(store, name, values, _attributes(stream, name))
            for name, values in tables(stream, hashes).items()
        }
        for layer, dtype in dtypes.items():
            create_residual(
                store, layer, stream.positions, manifest.d_model, dtype, manifest.layout,
                manifest.codec,
            )  # fmt: skip
        for array in arrays_of(manifest.capture.logits, manifest.vocab, logits_dtype):
            create_logits(store, array, stream.positions, manifest.layout, manifest.codec)
        files = {p.relative_to(staging).as_posix(): file_digest(p) for p in _plain_files(staging)}
        Journal(staging / "journal").commit_base(record, files)
        publish(staging, target)
    return target


def publish(staging: Path, target: Path) -> None:
    """Make the whole cache in the folder `staging` appear at `target`, unless there is one."""
    if is_remote(target):
        with exclusive(target / "leases", "create"):
            if not (target / "manifest.json").is_file():
                upload(staging, target, last=["manifest.json"])
        return
    sync_tree(staging)
    try:
        os.rename(staging, target)
    except OSError:
        if not (target / "manifest.json").is_file():
            raise
    sync_folder(target.parent)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A new folder `.new-*` that is locked as long as it is in use, and then removed."""
    if is_remote(root):
        with tempfile.TemporaryDirectory(prefix="residua-") as folder:
            yield Path(folder)
        return
    make_folder(root)
    while True:
        staging = root / f".new-{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # swept away by another process, which saw no lock yet
            continue
        try:
            if try_lock(descriptor) is False or not _is_open(descriptor, staging):
                continue
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sweep_unfinished(root: Path) -> None:
    """Remove the `.new-*` folders of makers that died: those that nobody has locked.

    Where folders cannot be locked, those that are older than `UNFINISHED_SECONDS`.
    """
    if is_remote(root):  # what was sent of a cache without a manifest is sent again
        return
    for staging in root.glob(".new-*"):
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except OSError:
            continue
        try:
            free = try_lock(descriptor)
            if free is None:
                free = time.time() - os.fstat(descriptor).st_mtime > UNFINISHED_SECONDS
            if free:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(descriptor)


def _attributes(stream: TokenStream, name: str) -> dict[str, Any]:
    """What zarr keeps beside a label that is coded: the words by code."""
    words = stream.categories.get(name)
    return {} if words is None else {"categories": list(words)}


def _plain_files(folder: Path) -> list[Path]:
    """Files that are not shards: manifest, provenance, head and array metadata."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.name != ORIGIN]
    return sorted(p for p in files if "arrays.zarr" not in p.parts or p.name == "zarr.json")


@dataclass(frozen=True)
class ValueRange:
    """How large the values of an array were on the calibrated rows, and what float16 costs them."""

    absmax: float = 0.0
    """Largest |value|."""
    float16_loss: float = 0.0
    """Largest error of a row's values in float16, relative to the row's largest |value|."""

    def joined(self, other: "ValueRange") -> "ValueRange":
        """The range of both."""
        loss = max(self.float16_loss, other.float16_loss)
        return ValueRange(max(self.absmax, other.absmax), loss)


def choose_dtype(values: ValueRange, compute_dtype: str, policy: str) -> str:
    """Stored dtype of a layer: never one that the calibrated values do not fit.

    Under `auto`: bfloat16 where the model ran in it, or where values are large; float32 where
    float16 would lose more of small values than its rounding.
    """
    if policy != "auto":
        return policy
    if compute_dtype == "bfloat16":
        return "bfloat16"
    if values.absmax > LARGEST["bfloat16"]:
        return "float32"
    if values.absmax > FP16_LIMIT:
        return "bfloat16"
    return "float16" if values.float16_loss <= FP16_ROUNDING else "float32"


class PartWriter:
    """Writes the rows of one part of every array of `keys`, then commits them at once.

    Where a lease can be lost, `held` is looked at before anything appears.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        part: int,
        keys: Sequence[Key],
        held: Lease | None = None,
    ) -> None:
        self._held = held or FileLease()
        arrays = {key: CacheArray(path / "arrays.zarr" / name_of(key)) for key in keys}
        self.part = part
        self.start, self.stop = layout.rows(part, next(iter(arrays.values())).shape[0])
        self.dtypes = {key: array.layout.logical_dtype for key, array in arrays.items()}
        self._row_shapes = {key: array.shape[1:] for key, array in arrays.items()}
        self._journal = Journal(path / "journal")
        self.quarantine: dict[int, str] = {}
        self._absmax = dict.fromkeys(keys, 0.0)
        self._nonfinite = dict.fromkeys(keys, 0)
        self._shards: dict[Key, ShardWriter] = {}
        try:
            for key, array in arrays.items():
                path = array.path / array.layout.shard_key(part)
                # Not the array's own folder: a cache that vanished must not come back as a stump.
                if not is_remote(path):
                    for folder in reversed(path.parents[: array.ndim]):
                        folder.mkdir(exist_ok=True)
                rows = self.stop - self.start
                self._shards[key] = shard_writer(path, array.layout, rows, make=False)
        except BaseException:
            self._abandon()
            raise

    def write(self, key: Key, position: int, values: np.ndarray) -> int:
        """Put float32 rows, or integers, at `position`; returns their non-finite values.

        Raises `UsageError` if the stored dtype turns a finite value into an infinity.
        """
        if values.dtype.kind != "f":
            return self.put(key, position, values, np.zeros(len(values), np.float32))
        peaks = np.abs(values.reshape(len(values), -1)).max(-1, initial=0.0)
        self.check(key, peaks)
        return self.put(key, position, encode(values, self.dtypes[key]), peaks)

    def put(self, key: Key, position: int, stored: np.ndarray, peaks: np.ndarray) -> int:
        """Put rows that are in the stored dtype, with the float32 peak |value| of each row.

        Rows with a finite peak that this dtype does not hold become NaN. Returns the number of
        non-finite values.
        """
        nonfinite = 0
        finite_peaks = np.isfinite(peaks)
        absmax = float(peaks[finite_peaks].max(initial=0.0))
        too_large = self.too_large(key, peaks)
        if too_large.any():
            stored = np.array(stored)
            stored[too_large] = encode(np.full(1, np.nan, np.float32), self.dtypes[key])[0]
        if too_large.any() or not finite_peaks.all():
            values = decode(stored, self.dtypes[key])
            finite = np.isfinite(values)
            nonfinite = int(values.size - finite.sum())
            absmax = max(absmax, float(np.abs(values[finite]).max(initial=0.0)))
            stored = encode(values, self.dtypes[key])  # one bit pattern for every NaN
        self._absmax[key] = max(self._absmax[key], absmax)
        self._nonfinite[key] += nonfinite
        rows = stored.reshape(len(stored), *self._row_shapes[key])
        self._shards[key].write(position - self.start, rows)
        return nonfinite

    def too_large(self, key: Key, peaks: np.ndarray) -> np.ndarray:
        """Which rows have a finite peak that the array's stored dtype does not hold."""
        return np.isfinite(peaks) & (peaks > LARGEST.get(self.dtypes[key], np.inf))

    def reason_too_large(self, key: Key, peaks: np.ndarray) -> str | None:
        """What is too large for the array's stored dtype, and what to do; None if nothing is."""
        too_large = self.too_large(key, peaks)
        if not too_large.any():
            return None
        dtype = self.dtypes[key]
        other = "bfloat16 or float32" if dtype == "float16" else "float32"
        what = f"layer {key}" if isinstance(key, int) else key
        return (
            f"{what} reaches {float(peaks[too_large].max()):.3g}, which {dtype} cannot hold "
            f"although the calibrated rows stayed below; extract with --dtype {other}"
        )

    def check(self, key: Key, peaks: np.ndarray) -> None:
        """Raise `UsageError` if a finite peak does not fit the array's stored dtype."""
        if reason := self.reason_too_large(key, peaks):
            raise UsageError(reason)

    def commit(self, expected: PartRecord | None = None) -> PartRecord:
        """Make every shard appear, then the commit record, if it says more than `expected`."""
        arrays = {
            name_of(key): ShardRecord(
                **shard, absmax=self._absmax[key], nonfinite=self._nonfinite[key]
            )
            for key, shard in self._commit_shards().items()
        }
        self._held.check()
        record = PartRecord(self.part, self.start, self.stop, arrays, self.quarantine)
        if expected is None or any(expected.arrays.get(n) != s for n, s in arrays.items()):
            self._journal.commit(record)
        return record

    def _commit_shards(self) -> dict[Key, dict[str, int]]:
        """Make every shard appear; several are sent to an object store at a time."""

        def commit(shard: ShardWriter) -> dict[str, int]:
            self._held.check()
            return shard.commit()

        shards = self._shards.values()
        if any(is_remote(shard.path) for shard in shards):
            with ThreadPoolExecutor(TRANSFERS) as pool:
                done = list(pool.map(commit, shards))
        else:
            done = [commit(shard) for shard in shards]
        return dict(zip(self._shards, done, strict=True))

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what was not committed."""
        self._abandon()

    def _abandon(self) -> None:
        with ExitStack() as stack:  # each one, even if another cannot be dropped
            for shard in self._shards.values():
                stack.callback(shard.abandon)
