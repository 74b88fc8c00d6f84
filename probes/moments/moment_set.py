"""`MomentSet`: the moments of many (layer, offset, target) per fold; merged, saved, read back.

A pass over a cache gives a `MomentSet` (`collect_moments.py`), `RidgeProbe.fit` takes one, and
`kept_moments.py` keeps them with a cache. On disk: `moments.json` and `moments.safetensors`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import (
    CorruptError,
    MismatchError,
    ModelError,
    NotFoundError,
    ResiduaError,
)
from ...cache.files.json_files import write_json
from ...cache.files.read_errors import check_readable
from ...cache.model.safetensors_header import read_header
from ...cache.store.activation_cache import ActivationCache
from .moments import Moments, merge_all
from .moments_table import read_moments_table
from .row_identity import layer_digest
from .shifted_sums import LayerOffsetTarget

if TYPE_CHECKING:
    from .pass_plan import MomentRequest


TABLE, TENSORS = "moments.json", "moments.safetensors"
"""Files of a saved set."""


@dataclass(frozen=True, eq=False)
class MomentSet:
    """Moments per (layer, offset, target) and fold; every ridge fit follows from them alone."""

    pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]]
    """Moments of each fold, by (layer, offset, target layer)."""
    cache_id: str | None = None
    """Id of the cache; None for arrays and for moments of several caches."""
    geometry: str | None = None
    """sha256 of the cache's head, `Head.digest`."""
    split: str | None = None
    """Split that was counted."""
    products: str | None = None
    """dtype of the products of blocks."""
    sequences: Mapping[str, Any] | None = None
    """`count` and `digest` of the sequences that were counted; see `sequences_digest`."""
    content: Mapping[int, str] = field(default_factory=dict)
    """Digest of the rows of each layer; see `layer_digest`."""
    depth: int | None = None
    """Number L of the last layer, which the head reads."""
    across_documents: bool = False
    """Whether pairs of two documents of a sequence were counted."""
    drop_first: int = 0
    """Positions at the start of each sequence that were no sources."""

    @classmethod
    def of(
        cls,
        cache: ActivationCache,
        request: "MomentRequest",
        pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]],
        sequences: Mapping[str, Any],
    ) -> "MomentSet":
        """The set of `pairs` that a pass over `sequences` of `cache` gave for `request`."""
        layers = sorted({*request.layers, *request.targets})
        return cls(
            pairs,
            cache_id=cache.id,
            geometry=cache.head.digest,
            split=request.split,
            products=request.products,
            sequences=sequences,
            content={layer: layer_digest(cache, layer) for layer in layers},
            depth=cache.n_blocks,
            across_documents=bool(request.across_documents),
            drop_first=int(request.drop_first),
        )

    @property
    def folds(self) -> int:
        """Number of folds."""
        return len(next(iter(self.pairs.values()), ()))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors; a tensor that several pairs share counts once."""
        return sum(array.nbytes for array in self._tensors().values())

    def parts(self, layer: int, offset: int, target: int | None = None) -> tuple[Moments, ...]:
        """Moments of each fold; the target may be left out if the set has only one."""
        matches = [p for p in self.pairs if p[:2] == (layer, offset) and target in (None, p[2])]
        if len(matches) != 1:
            raise NotFoundError(
                f"{len(matches)} moments of layer {layer}, offset {offset}, target {target}; "
                f"(layer, offset, target) are {', '.join(map(str, self.pairs))}"
            )
        return self.pairs[matches[0]]

    def total(self, layer: int, offset: int, target: int | None = None) -> Moments:
        """The moments of all folds."""
        return merge_all(self.parts(layer, offset, target))

    def merge(self, other: "MomentSet") -> "MomentSet":
        """The moments of both sets, which must not count a pair of positions twice.

        Raises `MismatchError` unless both have the same layers, offsets, targets, folds and head.
        """
        for name in ("geometry", "split", "folds", "across_documents", "drop_first"):
            if getattr(self, name) != getattr(other, name):
                raise MismatchError(
                    f"moments of {name} {getattr(self, name)} and {getattr(other, name)} do not "
                    "belong together; collect both alike"
                )
        if set(self.pairs) != set(other.pairs):
            raise MismatchError(
                f"moments of {sorted(self.pairs)} and of {sorted(other.pairs)} (layer, offset, "
                "target) do not belong together; collect both alike"
            )
        pairs = merge_pairs(self.pairs, other.pairs.__getitem__)
        return replace(
            self,
            pairs=pairs,
            cache_id=self.cache_id if self.cache_id == other.cache_id else None,
            products=self.products if self.products == other.products else None,
            sequences=None,
            content={},
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        """All arrays by their names in the file; targets share the moments of x."""
        tensors = {}
        for (layer, offset, target), parts in self.pairs.items():
            for fold, moments in enumerate(parts):
                x, y = _tensor_prefixes(layer, offset, target, fold)
                tensors[f"{x}.mean_x"], tensors[f"{x}.xx"] = moments.mean_x, moments.xx
                tensors[f"{y}.mean_y"], tensors[f"{y}.xy"] = moments.mean_y, moments.xy
        return tensors

    def save(self, path: str | Path) -> None:
        """Write `moments.safetensors` (float64), then `moments.json`, into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        digests = write_tensors(folder / TENSORS, self._tensors())
        rows = [
            {
                "layer": layer,
                "offset": offset,
                "target": target,
                "n": [moments.n for moments in parts],
                "yy": [moments.yy for moments in parts],
            }
            for (layer, offset, target), parts in self.pairs.items()
        ]
        table = {
            "cache": self.cache_id,
            "geometry": self.geometry,
            "split": self.split,
            "folds": self.folds,
            "products": self.products,
            "sequences": self.sequences,
            "depth": self.depth,
            "across_documents": self.across_documents,
            "drop_first": self.drop_first,
            "content": {str(layer): digest for layer, digest in self.content.items()},
            "pairs": rows,
            "tensors": digests,
        }
        write_json(folder / TABLE, table)

    @classmethod
    def load(
        cls,
        path: str | Path,
        pairs: Iterable[LayerOffsetTarget] | None = None,
        width: int | None = None,
    ) -> "MomentSet":
        """Read a folder of `save`, or some `pairs` of it, of rows of `width` numbers (None: any).

        Raises `CorruptError` for a changed byte, and for tensors that are no moments.
        """
        folder = Path(path)
        table = read_moments_table(folder / TABLE)
        row_of = {(row["layer"], row["offset"], row["target"]): row for row in table["pairs"]}
        across_documents, drop_first = scope_of(table)
        with tensor_reader(folder / TENSORS, table["tensors"]) as read:
            moments = {
                pair: tuple(_read_folds(pair, row_of[pair], read, width))
                for pair in (row_of if pairs is None else pairs)
            }
        return cls(
            moments,
            cache_id=table["cache"],
            geometry=table["geometry"],
            split=table["split"],
            products=table["products"],
            sequences=table["sequences"],
            content={int(layer): digest for layer, digest in table["content"].items()},
            depth=table["depth"],
            across_documents=across_documents,
            drop_first=drop_first,
        )


def scope_of(table: Mapping[str, Any]) -> tuple[bool, int]:
    """`across_documents` and `drop_first` of a `moments.json`; old files count all pairs."""
    return bool(table.get("across_documents", True)), int(table.get("drop_first", 0))


def merge_pairs(
    pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]],
    other_folds: Callable[[LayerOffsetTarget], tuple[Moments, ...]],
) -> dict[LayerOffsetTarget, tuple[Moments, ...]]:
    """The moments of `pairs` merged, fold by fold, with `other_folds(pair)`.

    Targets of one (layer, offset) share one matrix xx again, as they did before.
    """
    shared_xx: dict[tuple[int, int, int], np.ndarray] = {}
    merged: dict[LayerOffsetTarget, tuple[Moments, ...]] = {}
    for (layer, offset, target), folds in pairs.items():
        both = zip(folds, other_folds((layer, offset, target)), strict=True)
        merged[layer, offset, target] = tuple(
            replace(moments, xx=shared_xx.setdefault((layer, offset, fold), moments.xx))
            for fold, moments in enumerate([a.merge(b) for a, b in both])
        )
    return merged


def _read_folds(
    pair: LayerOffsetTarget,
    row: dict[str, Any],
    read: Callable[[str, int], np.ndarray],
    width: int | None,
) -> Iterator[Moments]:
    """The moments of each fold from a `row` of `moments.json` and the tensors that `read` gives."""
    for fold, (n, yy) in enumerate(zip(row["n"], row["yy"], strict=True)):
        x, y = _tensor_prefixes(*pair, fold)
        mean_x, mean_y = read(f"{x}.mean_x", 1), read(f"{y}.mean_y", 1)
        xx, xy = read(f"{x}.xx", 2), read(f"{y}.xy", 2)
        d_in, d_out = len(mean_x), len(mean_y)
        if xx.shape != (d_in, d_in) or xy.shape != (d_in, d_out) or not d_in or not d_out:
            raise ValueError(f"{x}: shapes {xx.shape} and {xy.shape} of {d_in} and {d_out} means")
        if width is not None and (d_in, d_out) != (width, width):
            raise ValueError(f"{x}: widths {d_in} and {d_out} of rows of {width}")
        yield Moments(n, mean_x, mean_y, xx, xy, yy)


def _tensor_prefixes(layer: int, offset: int, target: int, fold: int) -> tuple[str, str]:
    """Beginnings of the names of the tensors of x and of y."""
    return f"{layer}.{offset}.{fold}", f"{layer}.{offset}.{target}.{fold}"


@contextmanager
def tensor_reader(
    file: Path, digests: Mapping[str, str]
) -> Iterator[Callable[[str, int], np.ndarray]]:
    """A function that reads float64 tensors by name and number of axes, each once.

    It checks the sha256 of each. Every error of a file with other content, or of a disk that fails,
    is a `CorruptError`.
    """
    from safetensors import SafetensorError, safe_open

    cached: dict[str, np.ndarray] = {}

    def read(name: str, ndim: int) -> np.ndarray:
        if name not in cached:
            check_readable(file, *spans[name])
            stored = tensors.get_slice(name)
            if stored.get_dtype() != "F64" or len(stored.get_shape()) != ndim:
                raise ValueError(f"{name}: {stored.get_dtype()} of shape {stored.get_shape()}")
            tensor = tensors.get_tensor(name)
            if hashlib.sha256(tensor.data).hexdigest() != digests[name]:
                raise SafetensorError(f"digest of {name}")
            cached[name] = tensor
        return cached[name]

    try:
        spans = {name: entry.span for name, entry in read_header(file).items()}
        with safe_open(file, "numpy") as tensors:
            yield read
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        if isinstance(error, ResiduaError) and not isinstance(error, ModelError):
            raise
        raise CorruptError(f"{file} is missing or was changed after it was written") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write a safetensors file of float64, with fsync; returns the sha256 of each tensor.

    `safetensors.numpy.save_file` would make a second copy of all tensors in memory.
    """
    header, end = {}, 0
    for name, array in tensors.items():
        span = [end, end := end + array.nbytes]
        header[name] = {"dtype": "F64", "shape": array.shape, "data_offsets": span}
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors.items():
            data = np.ascontiguousarray(array, "<f8")
            digests[name] = hashlib.sha256(data.data).hexdigest()
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    return digests
