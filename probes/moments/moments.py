"""Moments: count, means and centred second moments of pairs (x, y), which merge in any order.

They are the sufficient statistics of linear regression (`ridge/solver.py`). Products of a block
are centred by the block's own mean and merged by the parallel update of Chan, Golub and LeVeque
(1979, "Updating formulae and a pairwise algorithm for computing sample variances"); every
accumulator is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cache.errors import UsageError

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
        """The moments of rows `x` `(n, d_in)` and `y` `(n, d_out)`: first the means, then the rest.

        `products` is the dtype of the products, one of `PRODUCTS`.
        """
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
        # The mean of the total is the weighted mean of both parts, solved for the remaining one.
        mean_x = self.mean_x + (self.mean_x - other.mean_x) * (other.n / n)
        mean_y = self.mean_y + (self.mean_y - other.mean_y) * (other.n / n)
        # Chan et al. (1979), solved for the remaining pairs: their scatter is the total's, less
        # the other's, less the scatter between the two means, n other.n / (n + other.n) d d'.
        root = np.sqrt(n * other.n / self.n)
        dx, dy = (mean_x - other.mean_x) * root, (mean_y - other.mean_y) * root
        xx = self.xx - other.xx - np.outer(dx, dx)
        xy = self.xy - other.xy - np.outer(dx, dy)
        return Moments(n, mean_x, mean_y, xx, xy, max(self.yy - other.yy - float(dy @ dy), 0.0))


class Accumulator:
    """Adds up `Moments` in place."""

    def __init__(self, d_in: int, d_out: int, products: str = "float64") -> None:
        self.products = products
        self.n: int = 0
        self.yy: float = 0.0
        self.mean_x: np.ndarray = np.zeros(d_in)
        self.mean_y: np.ndarray = np.zeros(d_out)
        self.xx: np.ndarray = np.zeros((d_in, d_in))
        self.xy: np.ndarray = np.zeros((d_in, d_out))

    def update(self, x: np.ndarray, y: np.ndarray) -> "Accumulator":
        """Add the pairs of rows `x` `(n, d_in)` and `y` `(n, d_out)`."""
        self.add(Moments.of(x, y, self.products))
        return self

    def add(self, block: Moments) -> None:
        """Add the pairs of `block`, by the update of Chan et al. (1979).

        With d the difference of the means and a, b the counts, the scatter of both is the sum of
        their scatters and of a b / (a + b) d d'; the mean moves by d b / (a + b).
        """
        if block.n == 0:
            return
        total = self.n + block.n
        dx, dy = block.mean_x - self.mean_x, block.mean_y - self.mean_y
        root = float(np.sqrt(self.n * block.n / total))
        # Scatter inside each of the two.
        self.xx += block.xx
        self.xy += block.xy
        self.yy += block.yy
        # Scatter between their means.
        if self.n:
            # The root on both sides keeps `xx` symmetric to the last bit.
            self.xx += (dx * root)[:, None] * (dx * root)
            self.xy += (dx * root)[:, None] * (dy * root)
            self.yy += float(dy @ dy) * root**2
        self.mean_x = self.mean_x + dx * (block.n / total)
        self.mean_y = self.mean_y + dy * (block.n / total)
        self.n = total

    def result(self) -> Moments:
        """The moments so far; the matrices are not copied."""
        return Moments(self.n, self.mean_x, self.mean_y, self.xx, self.xy, self.yy)


def merge_all(parts: Sequence[Moments]) -> Moments:
    """The moments of all `parts`, merged from the first to the last; of numpy or of torch."""
    total = Accumulator(len(parts[0].mean_x), len(parts[0].mean_y))
    for name in ("mean_x", "mean_y", "xx", "xy"):
        if hasattr(array := getattr(parts[0], name), "new_zeros"):  # tensors, on their device
            setattr(total, name, array.new_zeros(array.shape))
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
