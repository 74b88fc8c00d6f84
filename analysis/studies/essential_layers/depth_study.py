"""Essential layers (Kongmanee, 2501.15054): where an answer first appears and where it stays.

For every number of documents K in the context and position g of the one with the answer, the study
gives the first-correct layer F, the final layer S, the gap S - F and their spread, and tests
whether the gap over g is an inverted U. `answer_depths.py` has the definitions, `depth_rows.py` the
rows of the tables, `depth_texts.py` sentences and figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import choose_device
from ....cache.progress import Auto, StageProgress, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval, bootstrap_interval, resampling_counts
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.probe_names import name_readouts
from ..results.study_result import StudyResult, StudySubject
from .answer_depths import (
    AnswerDepths,
    check_labels,
    find_answers,
    measure_answer_depths,
    numeric_label,
)
from .depth_rows import SUBSETS, CurveRow, DepthRow, LayerRow
from .depth_texts import METHOD, NOT_SAID, QUESTION, depth_figure, depth_tables, describe_curve

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache


QUESTION_LABEL = "question"
"""Label of the question, where no other is named."""


def study_essential_layers(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    documents: str = "documents",
    gold: str = "gold",
    question: str | None = None,
    split: str = "all",
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Find the layers at which lenses first and finally read the answers of `cache`.

    The logit lens is always among the lenses. `documents` and `gold` name the labels with K and g;
    `question` that of the question (default: `question`, if there is such a label), which may stand
    in several sequences with the answer at several positions: then differences are within
    questions, and intervals resample questions; else sequences. Raises `UsageError` for a cache
    without answers, `NotFoundError` for labels and lenses that do not fit.
    """
    named = name_readouts(lenses, [LogitLens.of(cache, 0)])
    answers = find_answers(cache, split)
    if question is None and QUESTION_LABEL in cache.label_names:
        question = QUESTION_LABEL
    check_labels(cache, [documents, gold, *([question] if question else [])])
    of_documents = numeric_label(cache, documents, answers.sequences)
    of_gold = numeric_label(cache, gold, answers.sequences)
    if question is None:
        units = np.arange(len(answers.rows))
    else:
        _, units = np.unique(cache.label(question)[answers.sequences], return_inverse=True)
    cells = Cells(of_documents, of_gold, units.ravel(), seed)
    torch_device = choose_device(device)
    with show_stages(progress) as report:
        depths = []
        for number, (name, lens) in enumerate(named.items()):

            def share(done: int, total: int, number: int = number) -> None:
                assert report is not None
                report("answers", number * total + done, len(named) * total)

            depths.append(
                measure_answer_depths(
                    cache, answers, name, lens, torch_device, share if report else None
                )
            )
    rows = [row for found in depths for row in cells.depth_rows(found, question is not None)]
    layers = [row for found in depths for row in cells.layer_rows(found)]
    curves = [row for found in depths for row in cells.curve_rows(found, question is not None)]
    units_name = "sequence" if question is None else "question"
    return StudyResult(
        study="essential-layers",
        title=f"Essential layers of {cache.manifest.model_name}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=len(answers.rows),
            n_of="answers",
            units=units_name,
            n_units=cells.n_units,
        ),
        tables=depth_tables(rows, layers, curves),
        figures=[depth_figure(rows, layers, cache.n_blocks)],
        says=[describe_curve(curve) for curve in curves],
        does_not_say=[NOT_SAID],
        notes=_notes(depths, rows),
        settings={"documents": documents, "gold": gold, "question": question, "seed": seed},
    )


def _notes(depths: Sequence[AnswerDepths], rows: Sequence[DepthRow]) -> list[str]:
    """What a reader must know about the figures."""
    notes = [
        "The subset `final` holds the answers that the model gets right; where accuracy depends on "
        "the position, the subsets of two positions hold different questions.",
        "The gap of the logit lens mixes refinement with the drift of the basis between layers: "
        "compare it with a tuned or ridge lens.",
    ]
    gaps = [row.gap for row in rows if row.subset == "final" and row.gap is not None]
    if gaps and max(gaps) == 0:
        notes.append("The gap is 0 everywhere: once it is on top, the answer stays there.")
    undefined = sum(int(np.isnan(found.log_probability).any(1).sum()) for found in depths)
    if undefined:
        notes.append(f"{undefined} readings have logits that are not finite; they count as wrong.")
    return notes


@dataclass(frozen=True, eq=False)
class Cells:
    """The answers by number of documents and position of the answer's, and the units of intervals.

    All arrays are `(n,)`.
    """

    documents: np.ndarray
    gold: np.ndarray
    units: np.ndarray
    seed: int

    @property
    def n_units(self) -> int:
        """Number of questions or sequences."""
        return int(self.units.max()) + 1

    def masks(self) -> list[tuple[float, float, np.ndarray]]:
        """K, g and the mask of their answers, ascending."""
        pairs = np.unique(np.stack([self.documents, self.gold], 1), axis=0)
        return [
            (_whole(k), _whole(g), (self.documents == k) & (self.gold == g))
            for k, g in pairs.tolist()
        ]

    def subset(self, correct: np.ndarray, name: str) -> np.ndarray:
        """Mask of the answers of a subset; `correct` `(n,)` says where the last layer is right."""
        if name == "final":
            return correct
        kept = np.zeros(len(correct), bool)
        for k in np.unique(self.documents):
            of_k = self.documents == k
            count = np.bincount(self.units[of_k], minlength=self.n_units)
            right = np.bincount(self.units[of_k & correct], minlength=self.n_units)
            positions = len(np.unique(self.gold[of_k]))
            kept |= of_k & ((count == right) & (count >= positions))[self.units]
        return kept

    def interval(self, values: np.ndarray, units: np.ndarray) -> Interval:
        """95 % bootstrap interval over units of the mean of `values`; None without values."""
        if not len(values):
            return None, None
        names, numbers = np.unique(units, return_inverse=True)
        n = np.bincount(numbers, minlength=len(names)).astype(np.float64)
        sums = np.bincount(numbers, values, minlength=len(names))
        return bootstrap_interval(n, sums, resampling_counts(len(names), self.seed))

    def depth_rows(self, depths: AnswerDepths, has_questions: bool) -> list[DepthRow]:
        """The depths of one lens in every cell; the subset `everywhere` needs questions."""
        correct = depths.correct[:, -1]
        values = {
            "first": depths.first,
            "final": depths.final,
            "gap": depths.final - depths.first,
            "flips": depths.flips.astype(np.float64),
            "stay": depths.stay,
        }
        halfway = depths.halfway
        rows = []
        for subset in SUBSETS[: 1 + has_questions]:
            kept = self.subset(correct, subset)
            for k, g, cell in self.masks():
                both = cell & kept
                means = {name: _mean(found[both]) for name, found in values.items()}
                first, final, gap = (
                    self.interval(values[name][both], self.units[both])
                    for name in ("first", "final", "gap")
                )
                has_half = both & np.isfinite(halfway)
                rows.append(
                    DepthRow(
                        lens=depths.lens,
                        subset=subset,
                        documents=k,
                        gold=g,
                        n=int(cell.sum()),
                        accuracy=float(correct[cell].mean()),
                        accuracy_interval=self.interval(
                            correct[cell].astype(np.float64), self.units[cell]
                        ),
                        kept=int(both.sum()),
                        gap_median=float(np.median(values["gap"][both])) if both.any() else None,
                        halfway=_mean(halfway[has_half]),
                        halfway_share=_mean(has_half[both].astype(np.float64)),
                        first_interval=first,
                        final_interval=final,
                        gap_interval=gap,
                        **means,
                    )
                )
        return rows

    def layer_rows(self, depths: AnswerDepths) -> list[LayerRow]:
        """What one lens reads at each layer, in every cell."""
        return [
            LayerRow(
                lens=depths.lens,
                documents=k,
                gold=g,
                layer=layer,
                n=int(cell.sum()),
                accuracy=float(depths.correct[cell, column].mean()),
                log_probability=_mean(depths.log_probability[cell, column]),
                rank_median=float(np.median(depths.rank[cell, column])),
                first_share=float((depths.first[cell] == layer).mean()),
                final_share=float((depths.final[cell] == layer).mean()),
            )
            for k, g, cell in self.masks()
            for column, layer in enumerate(depths.layers)
        ]

    def curve_rows(self, depths: AnswerDepths, has_questions: bool) -> list[CurveRow]:
        """The quadratic term of the gap of one lens, for each K and subset."""
        correct, gap = depths.correct[:, -1], depths.final - depths.first
        rows = []
        for subset in SUBSETS[: 1 + has_questions]:
            kept = self.subset(correct, subset)
            for k in map(_whole, np.unique(self.documents).tolist()):
                chosen = kept & (self.documents == k)
                x = self.gold[chosen] / max(k - 1, 1)
                curve = QuadraticFit(x, gap[chosen], self.units[chosen], has_questions)
                rows.append(
                    CurveRow(
                        lens=depths.lens,
                        subset=subset,
                        documents=k,
                        quadratic=curve.term(),
                        interval=curve.interval(self.seed),
                        n=int(chosen.sum()),
                        paired=has_questions,
                    )
                )
        return rows


class QuadraticFit:
    """Least squares of y on 1, x and x^2, with an intercept for each question if `paired`.

    The sums of every unit are kept, so that a resample of the units is a weighted sum.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, units: np.ndarray, paired: bool) -> None:
        names, numbers = np.unique(units, return_inverse=True)
        self.positions: int = len(np.unique(x))
        columns = np.stack([x, x * x, y], 1) if len(x) else np.zeros((0, 3))
        if paired and len(x):
            count = np.bincount(numbers)[:, None]
            means = np.stack([np.bincount(numbers, column) for column in columns.T], 1) / count
            columns = columns - means[numbers]
        else:
            columns = np.concatenate([columns, np.ones((len(x), 1))], 1)
        size = columns.shape[1]
        self.paired = paired
        self.moments: np.ndarray = np.zeros((len(names), size, size))
        """Sum over the rows of each unit of the products of the columns x, x^2, y (and 1)."""
        np.add.at(self.moments, numbers, columns[:, :, None] * columns[:, None, :])

    def term(self, weights: np.ndarray | None = None) -> float | None:
        """The coefficient of x^2; None where the rows do not determine it."""
        if self.positions < 3:
            return None
        moments = np.tensordot(
            np.ones(len(self.moments)) if weights is None else weights, self.moments, 1
        )
        known = [0, 1] if self.paired else [0, 1, 3]
        normal, right = moments[np.ix_(known, known)], moments[known, 2]
        scale = np.sqrt(np.diag(normal))
        if not (scale > 0).all():
            return None
        scaled = normal / np.outer(scale, scale)
        if np.linalg.cond(scaled) > 1e10:
            return None
        return float(np.linalg.solve(scaled, right / scale)[1] / scale[1])

    def interval(self, seed: int) -> Interval:
        """95 % bootstrap interval of `term` over units; None where a fifth has no term."""
        if self.positions < 3 or len(self.moments) < 2:
            return None, None
        found = [self.term(weights) for weights in resampling_counts(len(self.moments), seed)]
        terms = [term for term in found if term is not None]
        if len(terms) < 0.8 * len(found):
            return None, None
        low, high = np.percentile(terms, (2.5, 97.5))
        return float(low), float(high)


def _whole(number: float) -> float:
    """`number` as an int where it is whole, as numbers of documents mostly are."""
    return int(number) if number.is_integer() else number


def _mean(values: np.ndarray) -> float | None:
    """Mean of the defined values; None without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
