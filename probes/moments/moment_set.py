"""Moments of many (layer, offset, target), per fold: merged, saved and read back."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import CorruptError, MismatchError, NotFoundError
from ...cache.files.json_files import read_json, write_json
from ...cache.store.activation_cache import ActivationCache
from .moments import Moments, merge_all
from .row_identity import layer_digest
from .shifted_sums import LayerOffsetTarget

if TYPE_CHECKING:
    from .pass_plan import MomentRequest


TABLE, TENSORS = "moments.json", "moments.safetensors"


@dataclass(frozen=True, eq=False)
class MomentSet:
    """Moments per (layer, offset, target) and fold: they give every ridge fit without a pass."""

    pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]]
    """Moments of each fold, by (layer, offset, target layer)."""
    cache_id: str | None = None
    geometry: str | None = None
    """Digest of the cache's head."""
    split: str | None = None
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
        """What a pass over `cache` found for `request`."""
        layers = sorted({*request.layers, *request.targets})
        content = {layer: layer_digest(cache, layer) for layer in layers}
        return cls(
            pairs, cache.id, cache.head.digest, request.split, request.products, sequences,
            content, cache.n_blocks, bool(request.across_documents), int(request.drop_first),
        )  # fmt: skip

    @property
    def folds(self) -> int:
        """Number of folds."""
        return len(next(iter(self.pairs.values()), ()))

    @property
    def bytes(self) -> int:
        """Bytes of all matrices; those that pairs share count once."""
        return sum(array.nbytes for array in self._tensors().values())

    def parts(self, layer: int, offset: int, target: int | None = None) -> tuple[Moments, ...]:
        """Moments of each fold; the target may be left out where there is one."""
        found = [p for p in self.pairs if p[:2] == (layer, offset) and target in (None, p[2])]
        if len(found) != 1:
            raise NotFoundError(
                f"{len(found)} moments of layer {layer}, offset {offset}, target {target}; "
                f"(layer, offset, target) are {', '.join(map(str, self.pairs))}"
            )
        return self.pairs[found[0]]

    def total(self, layer: int, offset: int, target: int | None = None) -> Moments:
        """The moments of all folds."""
        return merge_all(self.parts(layer, offset, target))

    def merge(self, other: "MomentSet") -> "MomentSet":
        """The moments of both sets of pairs, which must have no pair in common.

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
        pairs = merged(self.pairs, other.pairs.__getitem__)
        same = self.cache_id == other.cache_id
        products = self.products if self.products == other.products else None
        return replace(
            self, pairs=pairs, cache_id=self.cache_id if same else None, products=products,
            sequences=None, content={},
        )  # fmt: skip

    def with_pairs(self, pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]]) -> "MomentSet":
        """Other moments of the same rows."""
        return replace(self, pairs=pairs)

    def _tensors(self) -> dict[str, np.ndarray]:
        found = {}
        for (layer, offset, target), parts in self.pairs.items():
            for fold, moments in enumerate(parts):
                x, y = f"{layer}.{offset}.{fold}", f"{layer}.{offset}.{target}.{fold}"
                found[f"{x}.mean_x"], found[f"{x}.xx"] = moments.mean_x, moments.xx
                found[f"{y}.mean_y"], found[f"{y}.xy"] = moments.mean_y, moments.xy
        return found

    def save(self, path: str | Path) -> None:
        """Write `moments.safetensors` (float64), then `moments.json`, into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        digests = write_tensors(folder / TENSORS, self._tensors())
        table = [
            {"layer": layer, "offset": offset, "target": target,
             "n": [m.n for m in parts], "yy": [m.yy for m in parts]}
            for (layer, offset, target), parts in self.pairs.items()
        ]  # fmt: skip
        about = {
            "cache": self.cache_id, "geometry": self.geometry, "split": self.split,
            "folds": self.folds, "products": self.products, "sequences": self.sequences,
            "depth": self.depth, "across_documents": self.across_documents,
            "drop_first": self.drop_first,
            "content": {str(layer): value for layer, value in self.content.items()},
        }  # fmt: skip
        write_json(folder / TABLE, {**about, "pairs": table, "tensors": digests})

    @classmethod
    def load(
        cls, path: str | Path, pairs: Iterable[LayerOffsetTarget] | None = None
    ) -> "MomentSet":
        """Read a folder of `save`, or some `pairs` of it; a changed byte raises `CorruptError`."""
        folder = Path(path)
        about = read_json(folder / TABLE)
        table = {(row["layer"], row["offset"], row["target"]): row for row in about["pairs"]}
        chosen = table if pairs is None else pairs
        with reading(folder / TENSORS, about["tensors"]) as read:
            found = {pair: tuple(_parts(pair, table[pair], read)) for pair in chosen}
        content = {int(layer): value for layer, value in about["content"].items()}
        return cls(
            found, about["cache"], about["geometry"], about["split"], about["products"],
            about["sequences"], content, about["depth"], *scope_of(about),
        )  # fmt: skip


def scope_of(about: Mapping[str, Any]) -> tuple[bool, int]:
    """`across_documents` and `drop_first` of a `moments.json`; older ones count all pairs."""
    return bool(about.get("across_documents", True)), int(about.get("drop_first", 0))


def merged(
    pairs: Mapping[LayerOffsetTarget, tuple[Moments, ...]],
    others: Callable[[LayerOffsetTarget], tuple[Moments, ...]],
) -> dict[LayerOffsetTarget, tuple[Moments, ...]]:
    """The moments of `pairs` merged, fold by fold, with those that `others` gives for each."""
    xx: dict[tuple[int, int, int], np.ndarray] = {}
    found = {}
    for pair, mine in pairs.items():
        parts = [a.merge(b) for a, b in zip(mine, others(pair), strict=True)]
        found[pair] = tuple(
            # Targets share the second moments of x.
            replace(part, xx=xx.setdefault((*pair[:2], fold), part.xx))
            for fold, part in enumerate(parts)
        )
    return found


def _parts(
    pair: LayerOffsetTarget, row: dict[str, Any], read: Callable[[str], np.ndarray]
) -> Iterator[Moments]:
    layer, offset, target = pair
    for fold, (n, yy) in enumerate(zip(row["n"], row["yy"], strict=True)):
        x, y = f"{layer}.{offset}.{fold}", f"{layer}.{offset}.{target}.{fold}"
        yield Moments(
            n, read(f"{x}.mean_x"), read(f"{y}.mean_y"), read(f"{x}.xx"), read(f"{y}.xy"), yy
        )


@contextmanager
def reading(file: Path, digests: Mapping[str, str]) -> Iterator[Callable[[str], np.ndarray]]:
    """A function that reads tensors of a file by name, each once and checked by its sha256."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in found:
            tensor = tensors.get_tensor(name)
            if hashlib.sha256(tensor.data).hexdigest() != digests[name]:
                raise SafetensorError(f"digest of {name}")
            found[name] = tensor
        return found[name]

    try:
        with safe_open(file, "numpy") as tensors:
            yield read
    except (OSError, KeyError, SafetensorError) as error:
        raise CorruptError(f"{file} is missing or was changed after it was written") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write a safetensors file of float64, durable; returns the sha256 of each tensor.

    `safetensors.numpy.save_file` makes a second copy of all tensors in memory, this one of none.
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
