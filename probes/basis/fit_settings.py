"""`BasisFitSettings`: parameters of the fit of causal bases, checked."""

from dataclasses import dataclass

from ...cache.errors import UsageError

METHODS = ("joint", "greedy", "one-shot", "fisher")
"""Ways to find a basis; see `basis_methods.py`."""
METRICS = ("covariance", "euclidean")
"""Coordinates in which directions are orthonormal; see `coordinates.py`."""
REFERENCES = ("mean", "zero", "resample")
"""What ablated coordinates become: those of the mean row, of zero, or of another row."""


@dataclass(frozen=True)
class BasisFitSettings:
    """Parameters of the fit of a causal basis; see `CausalBasis`."""

    k: int
    method: str
    metric: str
    reference: str
    positions: int
    test_positions: int
    seed: int
    drop_first: int

    def check(self) -> "BasisFitSettings":
        """Raise `UsageError` for parameters that cannot be right."""
        for name, names in (("method", METHODS), ("metric", METRICS), ("reference", REFERENCES)):
            value = getattr(self, name)
            if value not in names:
                raise UsageError(f"{name} must be one of {', '.join(names)}, not {value!r}")
        for name, least in (
            ("k", 1),
            ("positions", 1),
            ("test_positions", 1),
            ("seed", 0),
            ("drop_first", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, not {getattr(self, name)}")
        return self
