"""Anomaly detection on trajectories (Belrose et al., 2303.08112), such as of prompt injections.

Detectors see clean documents alone; anomalies, a benign control and a distance of the states stand
beside each other. `residua data injection` writes such texts.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import FEW_DOCUMENTS
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.probe_names import describe_names, name_readouts
from ..results.study_result import StudyResult, StudySubject, StudyTable
from .anomaly_documents import (
    AnomalyDocuments,
    AnomalyLabels,
    FirstTokens,
    choose_documents,
    find_first_tokens,
    find_option_tokens,
)
from .anomaly_features import state_features, trajectory_features
from .anomaly_figures import draw_figures
from .anomaly_rows import (
    arm_pairs,
    detection_rows,
    outcome_rows,
    separate_all,
    template_rows,
)
from .anomaly_scores import STATES, QuestionSplits, score_documents, score_left_out
from .anomaly_texts import DOES_NOT_SAY, METHOD, make_sentences
from .detectors import NEIGHBOURS, OUTLIER_SHARE
from .separation import QuestionResamples

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

HEADINGS = {
    "positive": "arm",
    "negative": "against",
    "features": "features",
    "layer": "layer",
    "detector": "detector",
    "auroc": "AUROC",
    "auroc_interval": "95 %",
    "difference": "less the baseline",
    "difference_interval": "95 % of it",
    "shrinkage": "shrinkage",
}
TEMPLATE_HEADINGS = {
    "template": "template",
    "features": "features",
    "layer": "layer",
    "detector": "detector",
    "auroc": "AUROC",
    "auroc_interval": "95 %",
    "left_out": "template left out",
    "left_out_interval": "95 % of it",
    "loss": "loss",
    "loss_interval": "95 % of the loss",
    "n": "n",
}
OUTCOME_HEADINGS = {
    "arm": "arm",
    "template": "template",
    "n": "n",
    "accuracy": "accuracy",
    "accuracy_interval": "95 %",
    "change": "less clean",
    "change_interval": "95 % of it",
    "success": "attack success",
    "success_interval": "95 % of success",
    "n_success": "n of success",
}


def study_anomaly(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "all",
    max_positions: int = 16384,
    arm: str = "arm",
    clean: str = "clean",
    benign: str | None = "benign",
    question: str | None = "question",
    template: str | None = "template",
    last: int = 1,
    options: Sequence[str] = (),
    splits: int = 5,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Measure how well detectors tell documents of other arms from clean ones.

    The logit lens is always among the lenses. `arm` names the label of the arms, `clean` and
    `benign` its values for normal documents and for the control; `question` and `template` name
    labels, which may be missing. The position that predicts the answer is read, or in a cache of
    whole texts the mean of the `last` positions. `options` are words, the possible answers, whose
    log q at every layer makes further features. `splits` halves of the questions are drawn. Raises
    `UsageError` and `NotFoundError` for caches and lenses that do not fit.
    """
    if splits < 1:
        raise UsageError("the number of splits is 1 or more")
    labels = AnomalyLabels(
        arm=arm, clean=clean, benign=benign, question=question, template=template
    )
    named = name_readouts(lenses, [LogitLens.of(cache, 0)])
    documents = choose_documents(cache, split, last, labels, max_positions, seed)
    anomalous = (documents.arm != clean) & (documents.arm != (benign or clean))
    if not anomalous.any():
        raise UsageError(
            f"all documents of the split {split!r} are {clean!r} or {benign!r} by the label "
            f"{arm!r}: there is no anomaly to find"
        )
    halves = QuestionSplits.draw(documents, clean, splits, seed)
    tokens = find_option_tokens(cache, options) if options else {}
    with show_stages(progress) as report:
        sets, top = trajectory_features(
            documents, named, tokens, device, progress_of_stage(report, "trajectories")
        )
        states = state_features(cache, documents)
        scores = score_documents(sets, states, halves, seed, progress_of_stage(report, "detectors"))
    left_out = score_left_out(states, documents, halves, anomalous)
    first = find_first_tokens(documents, labels, top)

    resamples = QuestionResamples(documents.question, seed)
    pairs = arm_pairs(documents, clean, benign)
    rows = detection_rows(scores, pairs, separate_all(scores, pairs, resamples))
    fixed = [of for of in scores if of.features != STATES or of is scores[-1]]
    of_templates = template_rows(documents, fixed, left_out, anomalous, resamples)
    outcomes = outcome_rows(documents, first, top, anomalous, resamples, clean)
    undefined = sum(int((~np.isfinite(found.values)).any(1).sum()) for found in sets)
    return StudyResult(
        study="anomaly",
        title=f"Anomalies seen by lenses in {cache.manifest.model_name}",
        question="Does the path of a prediction through the layers tell "
        f"{_names(anomalous, documents)} from clean documents, better than the states themselves, "
        "and better than it tells a benign insertion?",
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=documents.count,
            n_of="documents",
            units="question",
            n_units=documents.n_questions,
            probes={name: " ".join(repr(lens).split()) for name, lens in named.items()},
        ),
        tables=[
            StudyTable("detection", "AUROC of detectors fitted on clean documents", HEADINGS, rows),
            StudyTable("templates", "AUROC by template", TEMPLATE_HEADINGS, of_templates),
            StudyTable("outcomes", "What the model answers", OUTCOME_HEADINGS, outcomes),
        ],
        figures=draw_figures(rows, of_templates, outcomes),
        says=make_sentences(rows, of_templates, outcomes, clean, benign),
        does_not_say=DOES_NOT_SAY,
        notes=_notes(documents, first, undefined, halves, len(left_out) > 0)
        + describe_names(named),
        settings={
            "seed": seed,
            "splits": splits,
            "last": last,
            "options": list(options),
            "max_positions": max_positions,
        },
    )


def _names(anomalous: np.ndarray, documents: AnomalyDocuments) -> str:
    """The arms of anomalies, for the question."""
    return ", ".join(f"`{arm}`" for arm in dict.fromkeys(documents.arm[anomalous].tolist()))


def _notes(
    documents: AnomalyDocuments,
    first: FirstTokens,
    undefined: int,
    halves: QuestionSplits,
    has_templates: bool,
) -> list[str]:
    """What a reader must know about single figures."""
    n_fit = [int((of_fit & halves.clean).sum()) for of_fit in halves.fit]
    fitted = f"{min(n_fit)} to {max(n_fit)}" if min(n_fit) < max(n_fit) else f"{n_fit[0]}"
    width = documents.sample.cache.d_model
    notes = [
        f"Detectors are fitted on {fitted} clean documents. Covariances of the "
        f"states, {width} columns, are shrunk towards a multiple of the identity by the share of "
        "Ledoit and Wolf in every case (column shrinkage), so that fewer documents than columns "
        "can be used.",
        "The relative distance is the Mahalanobis distance less that under uncorrelated columns of "
        "the same variances, a simplification of Ren et al. (2106.09022), whose background is a "
        "Gaussian of other data.",
        f"Standardised features; isolation forest of 100 trees, local outlier factor of "
        f"{NEIGHBOURS} neighbours, one-class SVM with nu = {OUTLIER_SHARE}, radial kernel. Nothing "
        "was tuned.",
        "Intervals resample the held-out questions; they leave out what other clean documents of "
        "the fit would change. An interval of width 0 at 1.00 says that no resample has an error, "
        "not that there is none.",
    ]
    if not has_templates:
        notes.append("Fewer than two templates: no template could be left out.")
    if undefined:
        notes.append(
            f"{undefined} sets of features have values that are not finite; such documents are "
            "left out of fits and scores of these features."
        )
    if first.note:
        notes.append(first.note[0].upper() + first.note[1:] + ".")
    if documents.n_questions == documents.count:
        notes.append("No two documents share a question: intervals resample documents.")
    if documents.n_questions < FEW_DOCUMENTS:
        notes.append(f"Only {documents.n_questions} questions: intervals are too narrow.")
    return notes
