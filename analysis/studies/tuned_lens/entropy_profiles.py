"""Entropy profiles by class of text (Entropy-Lens, 2502.16570), and how well they tell the classes.

The profile of a sequence is the mean entropy of a lens at each layer over its sampled positions.
Classifiers of profiles are cross-validated by document, and set beside the largest class, beside
the same with permuted labels, and beside the entropy of the model alone.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....cache.errors import UsageError
from ....probes.base.resampling import Interval, bootstrap_interval, resampling_counts
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import Trajectories

FOLDS = 5
PERMUTATIONS = 20
"""Permutations of the labels behind the chance level of a classifier."""
NEIGHBOURS = 5
MOST_CLASSES = 50
"""More words than that are a text, not a class."""


@dataclass(frozen=True)
class EntropyProfileRow:
    """Mean entropy of one lens at one layer over the sequences of one class."""

    lens: str
    label: str
    """The class."""
    layer: int
    n: int
    """Sequences."""
    entropy: float | None
    """Mean over sequences of their mean entropy, in nats."""
    entropy_interval: Interval


@dataclass(frozen=True)
class ProfileClassifierRow:
    """A classifier of entropy profiles, cross-validated with whole documents held out."""

    lens: str
    classifier: str
    features: str
    """`all layers`, or `model alone`: the entropy of the model's own distribution."""
    n: int
    """Sequences."""
    classes: int
    folds: int
    accuracy: float
    """Share of held-out sequences whose class is told."""
    accuracy_interval: Interval
    majority: float
    """Share of the largest class: what a constant guess reaches."""
    permuted: float
    """Mean accuracy with permuted labels."""
    permuted_high: float
    """The highest of these accuracies."""


@dataclass(frozen=True, eq=False)
class LabelledSequences:
    """The sampled sequences that have a class."""

    label: str
    """Name of the label."""
    numbers: np.ndarray
    """Numbers of the sequences, `(n,)`."""
    classes: np.ndarray
    """Class of each, `(n,)` str."""
    documents: np.ndarray
    """Document in which each begins, `(n,)` int64, from 0."""
    folds: int

    @classmethod
    def of(cls, sample: PositionSample, label: str) -> "LabelledSequences":
        """The sequences with a word in `label`; raises `UsageError` for labels without classes."""
        cache = sample.cache
        values = np.asarray(cache.label(label))[sample.sequences]
        words = np.array([_class_name(value) for value in values])
        has_class = (words != "") & np.isin(sample.sequences, sample.sequence_numbers)
        numbers, words = sample.sequences[has_class], words[has_class]
        names = np.unique(words)
        if not 2 <= len(names) <= MOST_CLASSES:
            raise UsageError(
                f"the label {label!r} has {len(names)} classes among the {len(numbers)} sampled "
                f"sequences that have one; a classifier takes 2 to {MOST_CLASSES}"
            )
        _, documents = np.unique(cache.sequence_document[numbers], return_inverse=True)
        documents = documents.ravel()
        of_class = [len(np.unique(documents[words == name])) for name in names]
        fewest = min(of_class)
        if fewest < 2:
            rare = str(names[np.argmin(of_class)])
            raise UsageError(
                f"the class {rare!r} of the label {label!r} stands in one sampled document alone: "
                "documents are held out whole, so that each class needs two; take a larger split "
                "or more positions"
            )
        return cls(label, numbers, words, documents, min(FOLDS, fewest))


def _class_name(value: Any) -> str:
    """Name of the class that a label's value is; empty for a missing one."""
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{float(value):.10g}"
    return str(value)


def entropy_profiles(
    sample: PositionSample, lens: Trajectories, sequences: np.ndarray
) -> np.ndarray:
    """Mean entropy at each layer of the positions of each of `sequences`, `(n, layers)` float64.

    NaN where none of the positions is defined.
    """
    place = np.searchsorted(sequences, sample.sequence_numbers)
    place = np.minimum(place, len(sequences) - 1)
    inside = sequences[place] == sample.sequence_numbers
    values = lens.values["entropy"].astype(np.float64)
    profiles = np.empty((len(sequences), values.shape[1]))
    for column, entropy in enumerate(values.T):
        known = inside & ~np.isnan(entropy)
        count = np.bincount(place[known], minlength=len(sequences))
        total = np.bincount(place[known], entropy[known], minlength=len(sequences))
        profiles[:, column] = np.divide(
            total, count, out=np.full(len(sequences), np.nan), where=count > 0
        )
    return profiles


def profile_rows(
    sample: PositionSample, readings: Mapping[str, Trajectories], labelled: LabelledSequences
) -> list[EntropyProfileRow]:
    """Mean profiles by lens and class."""
    weights = resampling_counts(int(labelled.documents.max()) + 1, sample.seed)
    rows = []
    for lens in readings.values():
        profiles = entropy_profiles(sample, lens, labelled.numbers)
        for name in np.unique(labelled.classes).tolist():
            of_class = labelled.classes == name
            for column, layer in enumerate(lens.layers):
                known = of_class & ~np.isnan(profiles[:, column])
                values, units = profiles[known, column], labelled.documents[known]
                n = np.bincount(units, minlength=weights.shape[1]).astype(np.float64)
                sums = np.bincount(units, values, minlength=weights.shape[1])
                rows.append(
                    EntropyProfileRow(
                        lens=str(lens.lens),
                        label=name,
                        layer=layer,
                        n=len(values),
                        entropy=float(values.mean()) if len(values) else None,
                        entropy_interval=bootstrap_interval(n, sums, weights),
                    )
                )
    return rows


def classifier_rows(
    sample: PositionSample, readings: Mapping[str, Trajectories], labelled: LabelledSequences
) -> list[ProfileClassifierRow]:
    """Nearest neighbours and logistic regression of profiles, for every lens.

    The entropy of the model alone is the same for all lenses and stands with the first one.
    """
    rows = []
    for number, lens in enumerate(readings.values()):
        profiles = entropy_profiles(sample, lens, labelled.numbers)
        features = {"all layers": profiles}
        if number == 0:
            features["model alone"] = profiles[:, -1:]
        for name, columns in features.items():
            known = np.atleast_1d(~np.isnan(columns).any(axis=1))
            for classifier in ("nearest", "logistic"):
                row = _classifier_row(columns[known], labelled, known, classifier, sample.seed)
                rows.append(_named(row, str(lens.lens), name))
    return rows


def _named(row: dict[str, Any], lens: str, features: str) -> ProfileClassifierRow:
    """A row with the names of its lens and features."""
    return ProfileClassifierRow(lens=lens, features=features, **row)


def _classifier_row(
    profiles: np.ndarray,
    labelled: LabelledSequences,
    known: np.ndarray,
    classifier: str,
    seed: int,
) -> dict[str, Any]:
    """Fields of a row, for the profiles `(n, features)` of the sequences of `known`."""
    classes, documents = labelled.classes[known], labelled.documents[known]
    right = held_out_correct(profiles, classes, documents, classifier, labelled.folds, seed=seed)
    count = int(labelled.documents.max()) + 1
    n = np.bincount(documents, minlength=count).astype(np.float64)
    sums = np.bincount(documents, right, minlength=count)
    rng = np.random.default_rng([seed, 3])
    permuted = [
        held_out_correct(
            profiles,
            permute_classes(classes, documents, rng),
            documents,
            classifier,
            labelled.folds,
            seed=seed,
        ).mean()
        for _ in range(PERMUTATIONS)
    ]
    _, sizes = np.unique(classes, return_counts=True)
    return {
        "classifier": {"nearest": f"{NEIGHBOURS} nearest", "logistic": "logistic regression"}[
            classifier
        ],
        "n": len(classes),
        "classes": len(sizes),
        "folds": labelled.folds,
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(n, sums, resampling_counts(count, seed)),
        "majority": float(sizes.max() / len(classes)),
        "permuted": float(np.mean(permuted)),
        "permuted_high": float(np.max(permuted)),
    }


def permute_classes(
    classes: np.ndarray, documents: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Classes permuted among documents, or among sequences where a document has several classes."""
    first = np.unique(documents, return_index=True)[1]
    number = np.searchsorted(documents[first], documents)
    of_document = classes[first]
    if (of_document[number] == classes).all():
        return of_document[rng.permutation(len(of_document))][number]
    return classes[rng.permutation(len(classes))]


def held_out_correct(
    features: np.ndarray,
    classes: np.ndarray,
    documents: np.ndarray,
    classifier: str,
    folds: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Whether each row's class is told by a classifier fitted on other documents, `(n,)` bool.

    `classifier` is `nearest` or `logistic`; features are standardised on the rows of the fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    right = np.zeros(len(classes), bool)
    with warnings.catch_warnings():
        # A class of few documents may be missing from a fold, and a fit may stop short: both show
        # in the accuracy.
        warnings.simplefilter("ignore")
        split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for fit, held_out in split.split(features, classes, documents):
            if len(np.unique(classes[fit])) < 2:
                right[held_out] = classes[held_out] == classes[fit][0]
                continue
            model: Any = (
                KNeighborsClassifier(min(NEIGHBOURS, len(fit)))
                if classifier == "nearest"
                else LogisticRegression(max_iter=1000)
            )
            pipeline = make_pipeline(StandardScaler(), model).fit(features[fit], classes[fit])
            right[held_out] = pipeline.predict(features[held_out]) == classes[held_out]
    return right
