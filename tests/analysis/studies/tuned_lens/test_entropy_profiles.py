"""Classes that differ in their entropy profiles are told apart, others by chance alone."""

from pathlib import Path

import numpy as np
import pytest

from residua.analysis.studies.trajectories.position_sample import PositionSample, choose_positions
from residua.analysis.studies.trajectories.readings import Trajectories
from residua.analysis.studies.tuned_lens import entropy_profiles as entropy_profiles_file
from residua.analysis.studies.tuned_lens.entropy_profiles import (
    LabelledSequences,
    classifier_rows,
    entropy_profiles,
    held_out_correct,
    permute_classes,
    profile_rows,
)
from residua.analysis.studies.tuned_lens.quality_sentences import classifier_sentences
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache

from ....support.synthetic import make_cache, random_head

LENGTHS = [10] * 60


def sample_of(root: Path) -> PositionSample:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(sum(LENGTHS), 4)) for _ in range(3)]
    documents = np.repeat(np.arange(30), 20)
    cache = make_cache(root, layers, LENGTHS, random_head(4, 9), documents=documents)
    return choose_positions(cache, "all")


def labelled_of(classes: np.ndarray) -> LabelledSequences:
    return LabelledSequences("kind", np.arange(60), classes, np.repeat(np.arange(30), 2), 5)


def lens_of(entropy: np.ndarray) -> Trajectories:
    top = np.zeros(entropy.shape, np.int64)
    return Trajectories("tuned", (0, 1, 2), {"entropy": entropy.astype(np.float32)}, top)


def test_profiles_are_means_over_the_positions_of_a_sequence(tmp_path: Path) -> None:
    sample = sample_of(tmp_path)
    rng = np.random.default_rng(1)
    entropy = rng.random((sample.count, 3))
    entropy[5:25, 1] = np.nan
    profiles = entropy_profiles(sample, lens_of(entropy), np.array([0, 1, 2, 7]))
    with np.errstate(invalid="ignore"):
        for row, sequence in enumerate((0, 1, 2, 7)):
            values = entropy[10 * sequence : 10 * sequence + 10]
            for column in range(3):
                known = values[~np.isnan(values[:, column]), column]
                if len(known):
                    assert profiles[row, column] == pytest.approx(known.mean(), abs=1e-6)
                else:
                    assert np.isnan(profiles[row, column])
    assert np.isnan(profiles[1, 1])


def test_planted_classes_are_told_and_shuffled_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy_profiles_file, "PERMUTATIONS", 6)
    sample = sample_of(tmp_path)
    rng = np.random.default_rng(2)
    classes = np.repeat(rng.permutation(["code", "prose"] * 15), 2)
    # Classes differ at the layers below alone: the model's own entropy tells nothing.
    shift = np.where(classes == "code", 1.0, 0.0)[sample.sequence_numbers]
    entropy = 2 + rng.normal(size=(sample.count, 3)) * 0.5
    entropy[:, 0] += shift
    readings = {"tuned": lens_of(entropy)}
    labelled = labelled_of(classes)
    rows = {
        (row.classifier, row.features): row for row in classifier_rows(sample, readings, labelled)
    }
    assert set(rows) == {
        (name, features)
        for name in ("5 nearest", "logistic regression")
        for features in ("all layers", "model alone")
    }
    for (_, features), row in rows.items():
        assert (row.n, row.classes, row.majority) == (60, 2, 0.5)
        assert 0.35 < row.permuted < 0.62
        if features == "all layers":
            assert row.accuracy > 0.9
            assert row.accuracy_interval[0] is not None
            assert row.accuracy_interval[0] > 0.8
        else:
            assert row.accuracy < 0.75
    said = classifier_sentences(list(rows.values()), "kind")
    assert ["no clear difference" in sentence for sentence in said[:2]] == [False, False]
    profiles = {(row.label, row.layer): row for row in profile_rows(sample, readings, labelled)}
    assert len(profiles) == 6
    code, prose = profiles["code", 0], profiles["prose", 0]
    assert (code.n, prose.n) == (30, 30)
    assert code.entropy == pytest.approx(entropy[shift == 1, 0].mean(), abs=1e-5)
    assert code.entropy_interval[0] is not None
    assert prose.entropy_interval[1] is not None
    assert code.entropy_interval[0] > prose.entropy_interval[1]
    # The same profiles with classes drawn anew.
    random = labelled_of(np.repeat(rng.permutation(["code", "prose"] * 15), 2))
    for row in classifier_rows(sample, readings, random):
        assert 0.2 < row.accuracy < 0.8


def test_documents_are_held_out_whole() -> None:
    """A classifier that could see another sequence of the document would be right."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(40), 4)
    classes = np.repeat(rng.permutation(["a", "b"] * 20), 4)
    features = rng.normal(size=(40, 2)).repeat(4, 0)  # tells the document, not the class
    for classifier in ("nearest", "logistic"):
        right = held_out_correct(features, classes, documents, classifier, 5)
        assert 0.25 < right.mean() < 0.75


def test_permuted_classes_keep_documents_together() -> None:
    rng = np.random.default_rng(4)
    documents = np.repeat(np.arange(10), 3)
    classes = np.repeat(np.array(["a", "b"] * 5), 3)
    permuted = permute_classes(classes, documents, rng)
    assert sorted(permuted) == sorted(classes)
    assert all(len(set(permuted[documents == number])) == 1 for number in range(10))
    mixed = np.array(["a", "b", "b"] * 10)
    assert sorted(permute_classes(mixed, documents, rng)) == sorted(mixed)


def test_labels_without_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sample_of(tmp_path)

    def label(values: np.ndarray) -> None:
        monkeypatch.setattr(ActivationCache, "label", lambda *_: values)

    label(np.array(["one"] * 60))
    with pytest.raises(UsageError, match="has 1 classes among the 60 sampled"):
        LabelledSequences.of(sample, "kind")
    label(np.arange(60).astype(float))
    with pytest.raises(UsageError, match="has 60 classes"):
        LabelledSequences.of(sample, "kind")
    label(np.array(["a"] * 59 + ["b"]))
    with pytest.raises(UsageError, match="the class 'b' of the label 'kind' stands in one"):
        LabelledSequences.of(sample, "kind")
    label(np.array([np.nan, 1.0, 2.0, 2.0, 1.0, 1.0] * 10))
    labelled = LabelledSequences.of(sample, "kind")
    assert len(labelled.numbers) == 50
    assert set(labelled.classes) == {"1", "2"}
    assert labelled.folds == 5
