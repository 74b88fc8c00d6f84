"""Methods that find k directions of a layer: one-shot, Fisher, greedy, joint; `find_basis`.

All look for orthonormal columns V `(r, k)` in the coordinates of a metric (`coordinates.py`):

one-shot   top eigenvectors of the gradient of the KL in the projector V V', where everything is
           ablated; one full gradient.
fisher     top eigenvectors of E[x x'] M F M', the KL to second order in small ablations, with the
           Fisher matrix F of the lens's distribution and M = unwhiten W.
greedy     the sequence of the tuned-lens paper (Belrose et al., 2303.08112, section 4): each
           direction maximises the KL of ablating it alone, orthogonal to the earlier ones. L-BFGS
           finds local maxima: where a later direction has more energy than an earlier one, the
           earlier slot is searched again from there, so that energies never increase.
joint      the span whose ablation has the largest KL, by `SpanSearch` from one-shot; then ordered
           inside the span, each direction chosen to maximise the KL of the span so far.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ablation_objective import AblationObjective
from .coordinates import AblationCoordinates
from .span_search import Evaluate, SpanSearch

SPAN_EVALUATIONS = 24
"""Most evaluations of the search for a joint span."""
SPAN_TOLERANCE = 1e-3
"""Relative gain that ends this search: later gains, .5 % in all, did not reach held-out rows."""
DIRECTION_EVALUATIONS = 60
"""Most evaluations of the search for one direction of the greedy sequence."""
ORDER_EVALUATIONS = 6
"""Most evaluations, on one group of rows, of the search for the next direction inside a span."""
EQUAL_ENERGY = 1e-6
"""Relative difference below which two energies count as equal."""


@dataclass
class BasisProgress:
    """What a method has found so far; a checkpoint keeps it between two evaluations."""

    span: np.ndarray | None = None
    """The joint span `(r, k)`, once found."""
    directions: list[np.ndarray] = field(default_factory=list)
    """Final directions `(r,)` so far, in order."""
    energies: list[float] = field(default_factory=list)
    """KL of ablating each of `directions` alone, of the greedy method."""
    start: np.ndarray | None = None
    """Start of the next search for a direction, where it is not the usual one."""
    repeats: int = 0
    """How often a slot of the greedy sequence was searched again."""
    search: SpanSearch | None = None
    """The search that is running."""
    evaluations: float = 0.0
    """Evaluations so far; of a part of the rows, that part of one."""
    seconds: float = 0.0
    """CPU seconds so far."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and arrays; `restore` is the inverse."""
        numbers: dict[str, Any] = {
            "energies": self.energies,
            "repeats": self.repeats,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "search": None,
        }
        arrays = {}
        if self.span is not None:
            arrays["span"] = self.span
        if self.directions:
            arrays["directions"] = np.stack(self.directions)
        if self.start is not None:
            arrays["start"] = self.start
        if self.search is not None:
            numbers["search"], search_arrays = self.search.state()
            arrays |= {f"search.{name}": array for name, array in search_arrays.items()}
        return numbers, arrays

    @classmethod
    def restore(cls, numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> "BasisProgress":
        """The progress that `state` described."""
        numbers = dict(numbers)
        search_numbers = numbers.pop("search")
        search_arrays = {
            name.removeprefix("search."): array
            for name, array in arrays.items()
            if name.startswith("search.")
        }
        search = None
        if search_numbers is not None:
            search = SpanSearch.restore(search_numbers, search_arrays)
        return cls(
            span=arrays.get("span"),
            directions=list(arrays.get("directions", ())),
            start=arrays.get("start"),
            search=search,
            **numbers,
        )


class BasisFinder:
    """Finds the basis of one layer; goes on from a `BasisProgress`.

    `report` is called after every evaluation, when `progress` is consistent.
    """

    def __init__(
        self,
        objective: AblationObjective,
        coordinates: AblationCoordinates,
        k: int,
        progress: BasisProgress | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self.objective = objective
        self.coordinates = coordinates
        self.k = k
        self.progress: BasisProgress = BasisProgress() if progress is None else progress
        self.report = report
        # Of the fit before an interruption.
        self._earlier = self.progress.evaluations, self.progress.seconds

    def find(self, method: str) -> np.ndarray:
        """Orthonormal columns `(r, k)` by `method`, one of `METHODS`."""
        if method == "fisher":
            basis = top_eigenvectors(self._fisher_matrix(), self.k)
        else:
            full_gradient = self.full_gradient()
            if method == "one-shot":
                basis = top_eigenvectors(full_gradient, self.k)
            elif method == "greedy":
                basis = self._greedy(full_gradient)
            else:
                basis = self._order(self._joint(full_gradient), full_gradient)
        self._count()
        return basis

    def full_gradient(self) -> np.ndarray:
        """Gradient of the mean KL in the projector V V' at the identity, `(r, r)`, symmetric.

        Ablated rows are u - x V V' M with x = D whiten and M = unwhiten W, so that the gradient is
        that of u, taken back through both.
        """
        weight = self.objective.weight
        through = self.coordinates.whiten.T @ self.objective.mean_matrix("full_gradient")
        gradient = -through @ (self.coordinates.unwhiten @ weight).T
        return (gradient + gradient.T) / 2

    def _fisher_matrix(self) -> np.ndarray:
        """sym(E[x x'] M F M') `(r, r)`: the gradient in the projector of the KL's second order."""
        lens = self.coordinates.unwhiten @ self.objective.weight
        second = self.coordinates.whiten.T @ self.objective.mean_matrix("second_moments")
        product = second @ self.coordinates.whiten
        product = product @ (lens @ self.objective.mean_matrix("fisher") @ lens.T)
        return (product + product.T) / 2

    def _joint(self, full_gradient: np.ndarray) -> np.ndarray:
        """The span with the largest KL, unordered columns `(r, k)`."""
        if self.progress.span is None:
            start = top_eigenvectors(full_gradient, self.k)
            new = SpanSearch(start, SPAN_EVALUATIONS, SPAN_TOLERANCE)
            self.progress.span = self._search(new, self._evaluate).basis
        return self.progress.span

    def _order(self, span: np.ndarray, full_gradient: np.ndarray) -> np.ndarray:
        """Columns of the same span, ordered so that prefixes have a large KL; `(r, k)`.

        Each search goes through the first group of rows alone: it only chooses among directions
        that all rows have chosen.
        """
        directions = self.progress.directions
        while len(directions) < self.k:
            earlier = _stack(directions, len(span))
            free = complement_in(span, earlier)
            if free.shape[1] == 1:
                directions.append(free[:, 0])
                break
            start = free @ top_eigenvectors(free.T @ full_gradient @ free, 1)

            def evaluate_prefix(direction: np.ndarray) -> tuple[float, np.ndarray]:
                """KL of the earlier directions and `direction`, and its gradient in the latter."""
                prefix = np.hstack([earlier, direction])  # noqa: B023
                value, gradient = self._evaluate(prefix, groups=1)
                return value, free @ (free.T @ gradient[:, -1:])  # noqa: B023

            search = self._search(SpanSearch(start, ORDER_EVALUATIONS), evaluate_prefix)
            directions.append(search.basis[:, 0])
        return _stack(directions, len(span))

    def _greedy(self, full_gradient: np.ndarray) -> np.ndarray:
        """Directions that maximise their own KL, each orthogonal to the earlier ones; `(r, k)`."""
        progress = self.progress
        width = len(full_gradient)
        while len(progress.directions) < self.k:
            earlier = _stack(progress.directions, width)
            start = progress.start
            if start is None:
                start = top_eigenvectors(without(earlier, full_gradient), 1)[:, 0]
            start = start - earlier @ (earlier.T @ start)
            start = (start / np.linalg.norm(start))[:, None]

            def evaluate_alone(direction: np.ndarray) -> tuple[float, np.ndarray]:
                """KL of `direction` alone, and its gradient orthogonal to the earlier ones."""
                value, gradient = self._evaluate(direction)
                return value, gradient - earlier @ (earlier.T @ gradient)  # noqa: B023

            search = self._search(SpanSearch(start, DIRECTION_EVALUATIONS), evaluate_alone)
            self._place(search.basis[:, 0], search.value)
        return _stack(progress.directions, width)

    def _place(self, direction: np.ndarray, energy: float) -> None:
        """Append a direction, or search an earlier slot again from it if it has more energy.

        After 4 k repeats directions are put in the order of their energies instead: they are
        orthogonal in any order.
        """
        progress = self.progress
        slot = next(
            (i for i, e in enumerate(progress.energies) if energy > e * (1 + EQUAL_ENERGY)),
            len(progress.energies),
        )
        if slot < len(progress.energies) and progress.repeats < 4 * self.k:
            del progress.directions[slot:], progress.energies[slot:]
            progress.start = direction
            progress.repeats += 1
            return
        progress.directions.insert(slot, direction)
        progress.energies.insert(slot, energy)
        progress.start = None

    def _search(self, new: SpanSearch, evaluate: Evaluate) -> SpanSearch:
        """The search that was running, or else the search `new`, after its end."""
        if self.progress.search is None:
            self.progress.search = new
        search = self.progress.search.run(evaluate, self._count_and_report)
        self.progress.search = None
        return search

    def _evaluate(self, basis: np.ndarray, groups: int | None = None) -> tuple[float, np.ndarray]:
        """Mean KL of ablating the span of `basis` `(r, k)`, and its gradient `(r, k)`."""
        coordinates = self.coordinates
        directions = coordinates.encoder(basis), coordinates.decoder(basis)
        loss, encoder, decoder = self.objective.evaluate(directions, groups)
        return loss, coordinates.whiten.T @ encoder.T + coordinates.unwhiten @ decoder.T

    def _count(self) -> None:
        """Enter evaluations and CPU seconds into the progress."""
        evaluations, seconds = self._earlier
        self.progress.evaluations = evaluations + self.objective.evaluations
        self.progress.seconds = seconds + self.objective.seconds

    def _count_and_report(self) -> None:
        self._count()
        self.report()


def top_eigenvectors(matrix: np.ndarray, k: int) -> np.ndarray:
    """Eigenvectors of the `k` largest eigenvalues of a symmetric `matrix`, `(r, k)`."""
    from scipy.linalg import eigh

    size = len(matrix)
    return eigh(matrix, subset_by_index=(size - k, size - 1))[1][:, ::-1].copy()


def without(directions: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A symmetric `matrix` restricted to the complement of orthonormal `directions` `(r, j)`.

    The directions become eigenvectors of the least eigenvalue.
    """
    if not directions.shape[1]:
        return matrix
    inside = matrix - directions @ (directions.T @ matrix)
    inside -= (inside @ directions) @ directions.T
    return inside - (1 + np.abs(matrix).sum(1).max()) * directions @ directions.T


def complement_in(span: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Orthonormal columns of `span` `(r, k)` orthogonal to `directions` `(r, j)` in it.

    Shape `(r, k - j)`.
    """
    inside = span.T @ directions
    basis = np.linalg.qr(inside, mode="complete")[0] if inside.shape[1] else np.eye(span.shape[1])
    return span @ basis[:, inside.shape[1] :]


def _stack(directions: list[np.ndarray], width: int) -> np.ndarray:
    """Directions as columns, `(width, number)`."""
    return np.stack(directions, axis=1) if directions else np.zeros((width, 0))
