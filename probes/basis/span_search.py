"""Riemannian L-BFGS over k-dimensional subspaces: `SpanSearch`, the maximiser of causal bases.

The objective depends on the span of the orthonormal columns of a basis alone, so the search runs
on the Grassmann manifold (Edelman, Arias and Smith, 1998): gradients less their part in the span,
steps brought back by QR, vectors carried along by projection, L-BFGS directions (Nocedal and
Wright, algorithm 7.4) with a backtracking line search.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Orthonormal columns `(r, k)` -> the objective and its gradient `(r, k)`."""

HISTORY = 12
"""Pairs of steps and gradient changes that L-BFGS keeps."""
TOLERANCE = 1e-4
"""A relative gain below this, twice in a row, ends a search, unless it has its own tolerance."""
FIRST_STEP = 0.4
"""Length of the first step, in radians."""
LONGEST_STEP = 1.0
"""Longest step, in radians."""
SUFFICIENT = 1e-4
"""Share of the gain that the gradient promises that a step must bring (Armijo's condition)."""


@dataclass
class SpanSearch:
    """State of a search for the span with the largest objective.

    `step` evaluates a trial step; `run` calls it until the search has ended. `state` and `restore`
    carry a search over an interruption without changing its course.
    """

    basis: np.ndarray
    """Best orthonormal columns so far, `(r, k)` float64."""
    max_evaluations: int = 60
    """The search ends after so many evaluations."""
    tolerance: float = TOLERANCE
    """A relative gain below this, twice in a row, ends the search."""
    value: float = -np.inf
    """Objective of `basis`."""
    gradient: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Horizontal gradient at `basis`, `(r, k)`."""
    evaluations: int = 0
    ended: bool = False
    small_gains: int = 0
    """Gains below `tolerance` in a row."""
    length: float = 1.0
    """Factor of the next trial along `direction`."""
    direction: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Direction of the current line search; empty between two line searches."""
    steps: list[np.ndarray] = field(default_factory=list)
    changes: list[np.ndarray] = field(default_factory=list)

    NUMBERS: ClassVar[tuple[str, ...]] = (
        "max_evaluations",
        "tolerance",
        "value",
        "evaluations",
        "ended",
        "small_gains",
        "length",
    )

    def run(self, evaluate: Evaluate, report: Callable[[], None] = lambda: None) -> "SpanSearch":
        """Evaluate trial steps until the search has ended; `report` is called after each."""
        while not self.ended:
            self.step(evaluate)
            report()
        return self

    def step(self, evaluate: Evaluate) -> None:
        """One evaluation: of the start, or of a trial along the current direction."""
        if not self.evaluations:
            self.basis = np.ascontiguousarray(self.basis)
            self.value, gradient = evaluate(self.basis)
            self.gradient, self.evaluations = self._horizontal(self.basis, gradient), 1
            self._begin_line_search()
            return
        trial = np.linalg.qr(self.basis + self.length * self.direction)
        # QR with a positive diagonal: continuous in the step.
        signs = np.where(np.diag(trial.R) < 0, -1.0, 1.0)
        basis = np.ascontiguousarray(trial.Q * signs)
        value, gradient = evaluate(basis)
        self.evaluations += 1
        promised = float((self.gradient * self.direction).sum())
        gain = value - self.value
        if np.isfinite(value) and gain >= SUFFICIENT * self.length * promised:
            self._accept(basis, value, self._horizontal(basis, gradient))
            return
        # Shorten the step to the maximum of the parabola through what is known.
        curvature = self.length * promised - gain if np.isfinite(gain) else np.inf
        shorter = 0.5 * self.length**2 * promised / curvature if curvature > 0 else 0.0
        self.length = min(max(shorter, 0.1 * self.length), 0.5 * self.length)
        if self.length * np.linalg.norm(self.direction) < 1e-6:
            # No gain along this direction: try the gradient once, or end.
            self.ended = not self.steps
            self.steps, self.changes = [], []
            self._begin_line_search()
        self._end_if_spent()

    def _accept(self, basis: np.ndarray, value: float, gradient: np.ndarray) -> None:
        """Move to `basis`; keep the step and the change of the gradient, carried to `basis`."""
        step = self._horizontal(basis, self.length * self.direction)
        change = self._horizontal(basis, self.gradient) - gradient
        carried = [
            (self._horizontal(basis, s), self._horizontal(basis, y))
            for s, y in zip(self.steps, self.changes, strict=True)
        ]
        product = float((step * change).sum())
        if product > 1e-10 * np.linalg.norm(step) * np.linalg.norm(change):
            carried.append((step, change))
        carried = carried[-HISTORY:]
        self.steps, self.changes = [s for s, _ in carried], [y for _, y in carried]
        is_small = value - self.value < self.tolerance * abs(value)
        self.small_gains = self.small_gains + 1 if is_small else 0
        self.basis, self.value, self.gradient = basis, value, gradient
        self.ended = self.small_gains >= 2
        self._begin_line_search()
        self._end_if_spent()

    def _begin_line_search(self) -> None:
        """Set the direction of ascent and the length of its first trial."""
        direction = self._lbfgs_direction()
        norm = float(np.linalg.norm(self.gradient))
        slope = float((direction * self.gradient).sum())
        if slope <= 1e-8 * norm * float(np.linalg.norm(direction)):
            self.steps, self.changes = [], []
            direction = self.gradient
        size = float(np.linalg.norm(direction))
        if size == 0 or not np.isfinite(size):
            self.ended = True
            size = 1.0
        longest = LONGEST_STEP / size
        self.direction = direction
        self.length = min(1.0, longest) if self.steps else FIRST_STEP / size

    def _lbfgs_direction(self) -> np.ndarray:
        """The inverse curvature estimate times the gradient, by the two-loop recursion."""
        direction, factors = self.gradient.copy(), []
        pairs = list(zip(self.steps, self.changes, strict=True))
        for step, change in reversed(pairs):
            factor = float((step * direction).sum() / (step * change).sum())
            factors.append(factor)
            direction -= factor * change
        if pairs:
            step, change = pairs[-1]
            direction *= float((step * change).sum() / (change * change).sum())
        for (step, change), factor in zip(pairs, reversed(factors), strict=True):
            correction = float((change * direction).sum() / (step * change).sum())
            direction += (factor - correction) * step
        return self._horizontal(self.basis, direction)

    def _end_if_spent(self) -> None:
        self.ended = self.ended or self.evaluations >= self.max_evaluations

    @staticmethod
    def _horizontal(basis: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """`vectors` `(r, k)` less their part in the span of `basis`; in C order.

        The last bits of sums depend on the order in memory, and a checkpoint keeps only one.
        """
        return np.ascontiguousarray(vectors - basis @ (basis.T @ vectors))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and arrays, for a checkpoint."""
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        arrays = {name: getattr(self, name) for name in ("basis", "gradient", "direction")}
        for name in ("steps", "changes"):
            arrays[name] = np.array(getattr(self, name)).reshape(-1, *self.basis.shape)
        return numbers, arrays

    @classmethod
    def restore(cls, numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> "SpanSearch":
        """The search that `state` described."""
        lists = {name: list(arrays[name]) for name in ("steps", "changes")}
        return cls(
            basis=arrays["basis"],
            gradient=arrays["gradient"],
            direction=arrays["direction"],
            steps=lists["steps"],
            changes=lists["changes"],
            **{name: numbers[name] for name in cls.NUMBERS},
        )
