"""Moments: the sufficient statistics of pairs (residual_l[t], residual_L[t+N]), from one pass.

A block's products are centred by the block's own mean and merged by the parallel update of Chan,
Golub and LeVeque (1979); every accumulator is float64.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cache.errors import CorruptError, UsageError
from ..cache.jsonfile import read_json, write_json

Pair = tuple[int, int]
"""(layer, offset)."""

PRODUCTS = ("float64", "float32")
"""Dtypes of block products; float32 takes half the time, at a relative error of about 1e-6."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, means and centred second moments of pairs `(x, y)`; float64."""

    n: int
    """Number of pairs."""
    mean_x: np.ndarray
    """`(d_in,)`."""
    mean_y: np.ndarray
    """`(d_out,)`."""
    xx: np.ndarray
    """Sum of (x - mean_x)(x - mean_x)', `(d_in, d_in)`."""
    xy: np.ndarray
    """Sum of (x - mean_x)(y - mean_y)', `(d_in, d_out)`."""
    yy: float
    """Sum of |y - mean_y|^2."""

    @classmethod
    def zero(cls, d_in: int, d_out: int) -> "Moments":
        """The moments of no pairs."""
        means = np.zeros(d_in), np.zeros(d_out)
        return cls(0, *means, np.zeros((d_in, d_in)), np.zeros((d_in, d_out)), 0.0)

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, products: str = "float64") -> "Moments":
        """The moments of rows `x` `(n, d_in)` and `y` `(n, d_out)`, by two passes in memory."""
        if len(x) == 0:
            return cls.zero(x.shape[1], y.shape[1])
        mean_x, x = centred(x, products)
        mean_y, y = centred(y, products)
        return cls(len(x), mean_x, mean_y, gram(x, x), gram(x, y), sum_of_squares(y))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of pairs."""
        total = Accumulator(len(self.mean_x), len(self.mean_y))
        total.add(self)
        total.add(other)
        return total.result()

    def minus(self, other: "Moments") -> "Moments":
        """The moments of these pairs without those of `other`, a subset: inverse of `merge`."""
        n = self.n - other.n
        if n < 0:
            raise UsageError(f"cannot take {other.n} pairs away from {self.n}")
        if n == 0:
            return Moments.zero(len(self.mean_x), len(self.mean_y))
        mean_x = self.mean_x + (self.mean_x - other.mean_x) * (other.n / n)
        mean_y = self.mean_y + (self.mean_y - other.mean_y) * (other.n / n)
        root = np.sqrt(n * other.n / self.n)
        dx, dy = (mean_x - other.mean_x) * root, (mean_y - other.mean_y) * root
        xx = self.xx - other.xx - np.outer(dx, dx)
        xy = self.xy - other.xy - np.outer(dx, dy)
        return Moments(n, mean_x, mean_y, xx, xy, max(self.yy - other.yy - float(dy @ dy), 0.0))


class Accumulator:
    """Adds up `Moments` in place."""

    def __init__(self, d_in: int, d_out: int, products: str = "float64") -> None:
        self.products = products
        self.n = 0
        self.yy = 0.0
        self.mean_x, self.mean_y = np.zeros(d_in), np.zeros(d_out)
        self.xx, self.xy = np.zeros((d_in, d_in)), np.zeros((d_in, d_out))

    def update(self, x: np.ndarray, y: np.ndarray) -> "Accumulator":
        """Add the pairs of rows `x` `(n, d_in)` and `y` `(n, d_out)`."""
        self.add(Moments.of(x, y, self.products))
        return self

    def add(self, block: Moments) -> None:
        """Add the pairs that `block` sums up."""
        if block.n == 0:
            return
        total = self.n + block.n
        dx, dy = block.mean_x - self.mean_x, block.mean_y - self.mean_y
        root = np.sqrt(self.n * block.n / total)
        self.xx += block.xx
        self.xy += block.xy
        self.yy += block.yy
        if self.n:
            # The root on both sides keeps `xx` symmetric to the last bit.
            self.xx += np.outer(dx * root, dx * root)
            self.xy += np.outer(dx * root, dy * root)
            self.yy += float(dy @ dy) * root**2
        self.mean_x = self.mean_x + dx * (block.n / total)
        self.mean_y = self.mean_y + dy * (block.n / total)
        self.n = total

    def result(self) -> Moments:
        """The moments so far; the matrices are not copied."""
        return Moments(self.n, self.mean_x, self.mean_y, self.xx, self.xy, self.yy)


def merge_all(parts: Sequence[Moments]) -> Moments:
    """The moments of all `parts`, merged from the first to the last."""
    total = Accumulator(len(parts[0].mean_x), len(parts[0].mean_y))
    for part in parts:
        total.add(part)
    return total.result()


def centred(rows: np.ndarray, products: str) -> tuple[np.ndarray, np.ndarray]:
    """The float64 mean of `rows`, and `rows` without it in the dtype of the products."""
    mean = rows.mean(axis=0, dtype=np.float64)
    return mean, (rows - mean).astype(products, copy=False)


def gram(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`x.T @ y` in float64; with `y` being `x`, numpy takes the symmetric product (SYRK)."""
    return (x.T @ y).astype(np.float64, copy=False)


def sum_of_squares(rows: np.ndarray) -> float:
    """Sum of all squared entries of `(n, d)` rows, float64."""
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Shifted:
    """The targets residual_L[t+N] of one block of whole sequences, for several offsets N."""

    offsets: tuple[int, ...]
    sources: list[np.ndarray]
    """Rows t that have a target, per offset."""
    tails: list[np.ndarray]
    """The other rows: the last N of each sequence, per offset."""
    means: list[np.ndarray]
    """Mean of the targets, per offset, `(d_out,)`."""
    squares: list[float]
    """Sum of squares of the centred targets, per offset."""
    targets: np.ndarray
    """Centred targets at row t, offsets side by side, zero where t has none."""

    @classmethod
    def of(
        cls, y: np.ndarray, lengths: np.ndarray, offsets: Sequence[int], products: str
    ) -> "Shifted":
        """Shift rows `y` `(n, d_out)` of sequences of the given `lengths`."""
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(y)) - 1
        width = y.shape[1]
        found = cls(
            tuple(offsets), [], [], [], [], np.zeros((len(y), width * len(offsets)), products)
        )
        for index, offset in enumerate(offsets):
            source = np.flatnonzero(left >= offset)
            mean, rows = np.zeros(width), np.zeros((0, width))
            if len(source):
                mean, rows = centred(y[source + offset], products)
            found.targets[source, index * width : (index + 1) * width] = rows
            found.sources.append(source)
            found.tails.append(np.flatnonzero(left < offset))
            found.means.append(mean)
            found.squares.append(sum_of_squares(rows))
        return found

    def moments(self, x: np.ndarray) -> list[Moments]:
        """Moments of rows `x` `(n, d_in)` of the same sequences with the targets, per offset."""
        mean, rows = centred(x, str(self.targets.dtype))
        whole, cross = gram(rows, rows), gram(rows, self.targets)
        width = len(self.means[0])
        out = []
        for index, (source, tail) in enumerate(zip(self.sources, self.tails, strict=True)):
            columns = slice(index * width, (index + 1) * width)
            n, y_mean, yy = len(source), self.means[index], self.squares[index]
            if n == 0:
                out.append(Moments.zero(x.shape[1], width))
            elif dominated(rows, tail, whole):
                x_mean, own = centred(x[source], str(rows.dtype))
                xy = gram(own, self.targets[source, columns])
                out.append(Moments(n, x_mean, y_mean, gram(own, own), xy, yy))
            else:
                # Centred targets make the cross moments independent of the centre of x.
                shift, xx = without(whole, rows[tail], n)
                out.append(Moments(n, mean + shift, y_mean, xx, cross[:, columns], yy))
        return out


def dominated(rows: np.ndarray, tail: np.ndarray, whole: np.ndarray) -> bool:
    """Whether taking `tail` away would cancel: over half of the rows, or of a column's squares."""
    if 2 * len(tail) > len(rows):
        return True
    squares = np.square(rows[tail], dtype=np.float64).sum(axis=0)
    return bool(np.any(2 * squares > np.diagonal(whole)))


def without(whole: np.ndarray, tail: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and centred products of the `n` rows left when `tail` leaves rows of mean zero."""
    if len(tail) == 0:
        return np.zeros(len(whole)), whole
    shift = -tail.sum(axis=0, dtype=np.float64) / n
    root = shift * np.sqrt(n)
    return shift, whole - gram(tail, tail) - np.outer(root, root)


_MATRICES = ("mean_x", "mean_y", "xx", "xy")


@dataclass(frozen=True, eq=False)
class MomentSet:
    """Moments per (layer, offset) and fold; saved, they give every ridge fit without a pass."""

    pairs: Mapping[Pair, tuple[Moments, ...]]
    """Moments of each fold, by (layer, offset)."""
    cache_id: str | None = None
    geometry: str | None = None
    """Digest of the cache's head."""
    split: str | None = None

    def total(self, pair: Pair) -> Moments:
        """The moments of all folds of `pair`."""
        return merge_all(self.pairs[pair])

    def save(self, path: str | Path) -> None:
        """Write `moments.safetensors` (float64), then `moments.json`, into the folder `path`."""
        from safetensors.numpy import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "moments.safetensors"
        save_file(dict(self._tensors()), file)
        table = [
            {
                "layer": layer,
                "offset": offset,
                "n": [m.n for m in parts],
                "yy": [m.yy for m in parts],
            }
            for (layer, offset), parts in self.pairs.items()
        ]
        about = {"cache": self.cache_id, "geometry": self.geometry, "split": self.split}
        write_json(folder / "moments.json", {**about, "pairs": table, "tensors": file_digest(file)})

    def _tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for (layer, offset), parts in self.pairs.items():
            for fold, moments in enumerate(parts):
                for name in _MATRICES:
                    array = np.ascontiguousarray(getattr(moments, name))
                    yield f"{layer}.{offset}.{fold}.{name}", array

    @classmethod
    def load(cls, path: str | Path) -> "MomentSet":
        """Read a folder of `save`; raises `CorruptError` on any changed byte."""
        from safetensors.numpy import load_file

        folder = Path(path)
        about = read_json(folder / "moments.json")
        file = folder / "moments.safetensors"
        if not file.is_file() or file_digest(file) != about.get("tensors"):
            raise CorruptError(f"{file} is missing or was changed after it was written")
        tensors = load_file(file)
        pairs = {}
        for row in about["pairs"]:
            layer, offset = row["layer"], row["offset"]
            pairs[layer, offset] = tuple(
                Moments(
                    n=n, yy=yy, **{k: tensors[f"{layer}.{offset}.{fold}.{k}"] for k in _MATRICES}
                )
                for fold, (n, yy) in enumerate(zip(row["n"], row["yy"], strict=True))
            )
        return cls(pairs, about["cache"], about["geometry"], about["split"])


def file_digest(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
