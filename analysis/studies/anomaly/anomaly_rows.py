"""Rows of `study anomaly`: AUROC of detectors, of templates, and what the attack does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....probes.base.resampling import Interval
from .anomaly_documents import AnomalyDocuments, FirstTokens
from .anomaly_scores import CLASSIFIER, STATES, DetectorScores, TemplateScores, question_templates
from .separation import QuestionResamples, Separation


@dataclass(frozen=True)
class DetectionRow:
    """How well one detector tells two arms apart on held-out questions."""

    features: str
    layer: int | None
    """Layer of the states; None for trajectories, and for all layers together."""
    detector: str
    negative: str
    """Arm that should score lower."""
    positive: str
    auroc: float | None
    """Mean over the splits; .5 is chance."""
    auroc_interval: Interval
    difference: float | None
    """AUROC less that of the Mahalanobis distance of the states of all layers, paired."""
    difference_interval: Interval
    shrinkage: float | None
    """Share of the identity in the covariance of the clean states (Ledoit and Wolf)."""
    n_negative: int
    """Documents of the arm; each split scores about half of them."""
    n_positive: int


@dataclass(frozen=True)
class TemplateRow:
    """How well anomalies of one template are told from the other documents of their questions."""

    features: str
    layer: int | None
    detector: str
    template: str
    auroc: float | None
    """Of a detector that saw no anomaly, or of a classifier that was trained on all templates."""
    auroc_interval: Interval
    left_out: float | None
    """Of a classifier that was trained without this template; None for detectors."""
    left_out_interval: Interval
    loss: float | None
    """`auroc` less `left_out`, paired: what a test on the templates of the training hides."""
    loss_interval: Interval
    n: int
    """Anomalies of this template."""


@dataclass(frozen=True)
class OutcomeRow:
    """What the model answers in one arm."""

    arm: str
    template: str
    """`all`, or one template."""
    n: int
    accuracy: float | None
    """Share of documents whose top token begins the right answer."""
    accuracy_interval: Interval
    change: float | None
    """Accuracy less that of the clean documents, of the same questions; None for those."""
    change_interval: Interval
    success: float | None
    """Share whose top token begins the attacker's answer; in clean documents that is chance."""
    success_interval: Interval
    n_success: int
    """Documents that `success` counts: those whose two answers begin with different tokens."""


@dataclass(frozen=True, eq=False)
class ArmPair:
    """Two arms that are compared, and masks of their documents, `(documents,)` bool."""

    negative: str
    positive: str
    is_negative: np.ndarray
    is_positive: np.ndarray


def arm_pairs(documents: AnomalyDocuments, clean: str, benign: str | None) -> list[ArmPair]:
    """Clean against each other arm, then benign against each that is neither; anomalies first."""
    arms = [arm for arm in dict.fromkeys(documents.arm.tolist()) if arm != clean]
    arms.sort(key=lambda arm: (arm == benign, arm))
    wanted = [(clean, arm) for arm in arms]
    if benign in arms:
        wanted += [(str(benign), arm) for arm in arms if arm != benign]
    return [
        ArmPair(negative, positive, documents.arm == negative, documents.arm == positive)
        for negative, positive in wanted
    ]


def separate_all(
    scores: Sequence[DetectorScores], pairs: Sequence[ArmPair], resamples: QuestionResamples
) -> list[list[Separation]]:
    """The separation of each pair by each detector, pair by pair."""
    return [
        [resamples.separate(of.scores, pair.is_negative, pair.is_positive) for of in scores]
        for pair in pairs
    ]


def detection_rows(
    scores: Sequence[DetectorScores],
    pairs: Sequence[ArmPair],
    separations: Sequence[Sequence[Separation]],
) -> list[DetectionRow]:
    """A row for each detector and pair; the last detector is the baseline of differences."""
    rows = []
    for pair, of_pair in zip(pairs, separations, strict=True):
        baseline = of_pair[-1]
        for of, found in zip(scores, of_pair, strict=True):
            difference = found.minus(baseline)
            is_baseline = found is baseline
            rows.append(
                DetectionRow(
                    features=of.features,
                    layer=of.layer,
                    detector=of.detector,
                    negative=pair.negative,
                    positive=pair.positive,
                    auroc=found.value,
                    auroc_interval=found.interval,
                    difference=None if is_baseline else difference.value,
                    difference_interval=(None, None) if is_baseline else difference.interval,
                    shrinkage=of.shrinkage,
                    n_negative=int(pair.is_negative.sum()),
                    n_positive=int(pair.is_positive.sum()),
                )
            )
    return rows


def template_rows(
    documents: AnomalyDocuments,
    scores: Sequence[DetectorScores],
    left_out: Sequence[TemplateScores],
    anomalous: np.ndarray,
    resamples: QuestionResamples,
) -> list[TemplateRow]:
    """Rows of each template: detectors that were fitted on clean documents, and classifiers."""
    template = question_templates(documents, anomalous)[documents.question]
    rows = []
    for name in sorted(set(template[anomalous].tolist()) - {""}):
        of_name = template == name
        arms = ArmPair("others", name, of_name & ~anomalous, of_name & anomalous)
        for of in scores:
            found = resamples.separate(of.scores, arms.is_negative, arms.is_positive)
            rows.append(_template_row((of.features, of.layer, of.detector), arms, found))
        for of_layer in left_out:
            within, without = (
                resamples.separate(values, arms.is_negative, arms.is_positive)
                for values in (of_layer.within, of_layer.left_out)
            )
            key = STATES, of_layer.layer, CLASSIFIER
            rows.append(_template_row(key, arms, within, without))
    return rows


def _template_row(
    key: tuple[str, int | None, str],
    arms: ArmPair,
    found: Separation,
    left_out: Separation | None = None,
) -> TemplateRow:
    """One row of features, layer and detector; a detector that saw no anomaly has no `left_out`."""
    features, layer, detector = key
    loss = None if left_out is None else found.minus(left_out)
    return TemplateRow(
        features=features,
        layer=layer,
        detector=detector,
        template=arms.positive,
        auroc=found.value,
        auroc_interval=found.interval,
        left_out=None if left_out is None else left_out.value,
        left_out_interval=(None, None) if left_out is None else left_out.interval,
        loss=None if loss is None else loss.value,
        loss_interval=(None, None) if loss is None else loss.interval,
        n=int(arms.is_positive.sum()),
    )


def outcome_rows(
    documents: AnomalyDocuments,
    first: FirstTokens,
    top: np.ndarray,
    anomalous: np.ndarray,
    resamples: QuestionResamples,
    clean: str,
) -> list[OutcomeRow]:
    """Accuracy and attack success of each arm, over all documents and by template."""
    template = question_templates(documents, anomalous)[documents.question]
    right = np.where(first.answer >= 0, (top == first.answer).astype(float), np.nan)
    success = np.where(first.wanted >= 0, (top == first.wanted).astype(float), np.nan)
    names = sorted(set(template[anomalous].tolist()) - {""})
    rows = []
    for arm in dict.fromkeys(documents.arm.tolist()):
        of_arm = documents.arm == arm
        masks = {"all": of_arm} | {
            name: of_arm & (template == name) for name in names if len(names) > 1
        }
        for name, mask in masks.items():
            if not mask.any():
                continue
            # Values of other documents are undefined in this row.
            accuracy = resamples.mean(np.where(mask, right, np.nan))
            share = resamples.mean(np.where(mask, success, np.nan))
            in_clean = (documents.arm == clean) & ((template == name) | (name == "all"))
            change = accuracy.minus(resamples.mean(np.where(in_clean, right, np.nan)))
            is_clean = arm == clean
            rows.append(
                OutcomeRow(
                    arm=str(arm),
                    template=name,
                    n=int(mask.sum()),
                    accuracy=accuracy.value,
                    accuracy_interval=accuracy.interval,
                    change=None if is_clean else change.value,
                    change_interval=(None, None) if is_clean else change.interval,
                    success=share.value,
                    success_interval=share.interval,
                    n_success=int(np.isfinite(success[mask]).sum()),
                )
            )
    return rows
