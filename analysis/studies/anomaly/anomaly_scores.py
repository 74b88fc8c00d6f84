"""Scores of all detectors over several splits of the questions: `score_documents`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....cache.errors import UsageError
from .anomaly_documents import AnomalyDocuments
from .anomaly_features import FeatureSet
from .detectors import (
    DETECTORS,
    DISTANCE,
    RELATIVE,
    SMALLEST_FIT,
    MahalanobisDistance,
    fit_classifier,
    fit_detector,
)

STATES = "states"
"""Name of the features that are the residual stream itself."""
CLASSIFIER = "logistic regression"
"""The only detector that learns from labelled anomalies; it is no baseline of the others."""


@dataclass(frozen=True, eq=False)
class DetectorScores:
    """Scores of one detector, `(splits, documents)`; NaN for documents of the fit."""

    features: str
    layer: int | None
    """Layer of the states; None for trajectories, and for all layers together."""
    detector: str
    scores: np.ndarray
    shrinkage: float | None = None
    """Mean share of the shrinkage of a covariance over the splits."""


@dataclass(frozen=True, eq=False)
class QuestionSplits:
    """Seeded halves of the questions: detectors are fitted on one, and score the other."""

    fit: np.ndarray
    """Whether a split fits on the documents of a question, `(splits, documents)` bool."""
    clean: np.ndarray
    """Whether a document is clean, `(documents,)` bool."""

    @classmethod
    def draw(
        cls, documents: AnomalyDocuments, clean: str, splits: int, seed: int
    ) -> "QuestionSplits":
        """`splits` halves of the questions; raises `UsageError` for too few clean documents."""
        count = documents.n_questions
        is_clean = documents.arm == clean
        halves = []
        for number in range(splits):
            order = np.random.default_rng([seed, number]).permutation(count)
            of_fit = np.isin(documents.question, order[: count // 2])
            n_clean = int((of_fit & is_clean).sum())
            if n_clean < SMALLEST_FIT:
                raise UsageError(
                    f"a half of the questions has {n_clean} clean documents; detectors need "
                    f"{SMALLEST_FIT}: extract more questions, or read --split all"
                )
            halves.append(of_fit)
        return cls(np.stack(halves), is_clean)


def score_documents(
    sets: Sequence[FeatureSet],
    states: Mapping[int, np.ndarray],
    splits: QuestionSplits,
    seed: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[DetectorScores]:
    """Scores of all detectors on all feature sets, and of the distances of the states by layer.

    The last two entries are the distances of all layers together: the sum over the layers of the
    squared distance by its mean over the documents of the fit, and the same of the relative one
    without the division.
    """
    found: list[DetectorScores] = []
    steps = len(sets) + len(states)
    for number, features in enumerate(sets):
        for detector in DETECTORS:
            scores = np.full(splits.fit.shape, np.nan)
            for split, of_fit in enumerate(splits.fit):
                known = np.isfinite(features.values).all(1)
                rows = features.values[of_fit & splits.clean & known]
                _check_rows(len(rows), features.name)
                others = ~of_fit & known
                scores[split, others] = fit_detector(detector, rows, seed)(features.values[others])
            found.append(DetectorScores(features.name, None, detector, scores))
        if progress is not None:
            progress(number + 1, steps)
    squared_sum, relative_sum = np.zeros(splits.fit.shape), np.zeros(splits.fit.shape)
    by_layer: dict[str, list[DetectorScores]] = {DISTANCE: [], RELATIVE: []}
    for number, (layer, values) in enumerate(states.items()):
        squared, relative = (np.full(splits.fit.shape, np.nan) for _ in range(2))
        shrinkage = []
        for split, of_fit in enumerate(splits.fit):
            known = np.isfinite(values).all(1)
            rows = values[of_fit & splits.clean & known]
            _check_rows(len(rows), f"layer {layer}")
            distance = MahalanobisDistance(rows)
            others = ~of_fit & known
            squared[split, others] = distance.squared(values[others])
            relative[split, others] = distance.relative(values[others])
            # A layer at which all clean documents are equal has no scale, and says nothing.
            scale = distance.squared(rows).mean()
            squared_sum[split] += squared[split] / scale if scale > 0 else 0.0 * squared[split]
            shrinkage.append(distance.shrinkage)
        relative_sum += relative
        share = float(np.mean(shrinkage))
        by_layer[DISTANCE].append(DetectorScores(STATES, layer, DISTANCE, squared, share))
        by_layer[RELATIVE].append(DetectorScores(STATES, layer, RELATIVE, relative, share))
        if progress is not None:
            progress(len(sets) + number + 1, steps)
    found += [*by_layer[DISTANCE], *by_layer[RELATIVE]]
    found.append(DetectorScores(STATES, None, RELATIVE, relative_sum))
    found.append(DetectorScores(STATES, None, DISTANCE, squared_sum))
    return found


def _check_rows(count: int, name: str) -> None:
    """Raise `UsageError` where too few clean rows are finite."""
    if count < SMALLEST_FIT:
        raise UsageError(
            f"{name}: only {count} clean documents of a half have finite features; detectors need "
            f"{SMALLEST_FIT}"
        )


@dataclass(frozen=True, eq=False)
class TemplateScores:
    """Scores of classifiers of the states, `(splits, documents)`; NaN where not scored."""

    layer: int
    within: np.ndarray
    """Trained on all templates."""
    left_out: np.ndarray
    """Trained without the template of the document."""


def score_left_out(
    states: Mapping[int, np.ndarray],
    documents: AnomalyDocuments,
    splits: QuestionSplits,
    anomalous: np.ndarray,
) -> list[TemplateScores]:
    """Scores of a logistic regression of each layer, with and without the document's template.

    It tells `anomalous` documents `(documents,)` from all others of the questions of the fit. The
    template of a clean document is that of the anomaly of its question. Empty without two
    templates.
    """
    of_question = question_templates(documents, anomalous)
    template = of_question[documents.question]
    names = sorted(set(template[anomalous].tolist()) - {""})
    if len(names) < 2:
        return []
    found = []
    for layer, values in states.items():
        known = np.isfinite(values).all(1)
        within, left_out = (np.full(splits.fit.shape, np.nan) for _ in range(2))
        for split, of_fit in enumerate(splits.fit):
            rows, others = of_fit & known, ~of_fit & known
            if not _has_both(anomalous[rows]):
                continue
            score = fit_classifier(values[rows], anomalous[rows])
            within[split, others] = score(values[others])
            for name in names:
                kept, of_name = rows & (template != name), others & (template == name)
                if _has_both(anomalous[kept]) and of_name.any():
                    score = fit_classifier(values[kept], anomalous[kept])
                    left_out[split, of_name] = score(values[of_name])
        found.append(TemplateScores(layer, within, left_out))
    return found


def question_templates(documents: AnomalyDocuments, anomalous: np.ndarray) -> np.ndarray:
    """Template of the anomaly of each question, as text, `(questions,)`; empty without one.

    Of several the first counts.
    """
    found = np.full(documents.n_questions, "", object)
    if documents.template is not None:
        for row in np.flatnonzero(anomalous)[::-1]:
            found[documents.question[row]] = documents.template[row]
    return found


def _has_both(values: np.ndarray) -> bool:
    return bool(values.any() and not values.all())
