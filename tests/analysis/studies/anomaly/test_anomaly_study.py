"""A planted anomaly is found at its layer alone; where nothing is planted, nothing is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

import residua
from residua.analysis.studies.anomaly.anomaly_documents import (
    AnomalyLabels,
    choose_documents,
    find_first_tokens,
    find_option_tokens,
)
from residua.analysis.studies.anomaly.anomaly_features import trajectory_features
from residua.analysis.studies.anomaly.anomaly_scores import (
    CLASSIFIER,
    STATES,
    QuestionSplits,
    score_left_out,
)
from residua.analysis.studies.anomaly.anomaly_study import study_anomaly
from residua.analysis.studies.anomaly.detectors import DISTANCE, MahalanobisDistance
from residua.analysis.studies.results.study_result import StudyResult
from residua.analysis.studies.texts.injection_data import write_injection_data
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main

from ....support.labelled import LabelledCache
from ....support.synthetic import make_cache, random_head

QUESTIONS, LENGTH, WIDTH = 60, 3, 8
ARMS = ("clean", "injected", "benign")
TEMPLATES = ("one", "two", "three")


def planted_cache(
    root: Path, layer: int | None = 2, size: float = 8.0, spoil: bool = False
) -> LabelledCache:
    """Random states; those of injected documents are shifted at the last position of `layer`.

    Templates shift along directions of their own. Benign documents are not shifted.
    """
    rng = np.random.default_rng(0)
    count = QUESTIONS * len(ARMS)
    layers = [rng.normal(size=(count * LENGTH, WIDTH)).astype(np.float32) for _ in range(4)]
    arm = np.tile(ARMS, QUESTIONS)
    question = np.repeat(np.arange(QUESTIONS), len(ARMS))
    template = np.where(arm == "clean", "none", np.array(TEMPLATES)[question % len(TEMPLATES)])
    last = np.arange(count) * LENGTH + LENGTH - 1
    if layer is not None:
        rows = last[arm == "injected"]
        layers[layer][rows, question[arm == "injected"] % len(TEMPLATES)] += size
    if spoil:
        layers[1][last[:6]] = np.nan
    cache = make_cache(root, layers, [LENGTH] * count, random_head(WIDTH, 32))
    return LabelledCache(cache, {"arm": arm, "question": question, "template": template})


def distances(result: StudyResult, positive: str) -> dict[int | None, Any]:
    return {
        row.layer: row
        for row in result.table("detection").rows
        if (row.features, row.detector, row.negative) == (STATES, DISTANCE, "clean")
        and row.positive == positive
    }


def holds_chance(interval: tuple[float | None, float | None]) -> bool:
    low, high = interval
    return low is not None and high is not None and low <= 0.5 <= high


def test_a_planted_anomaly_is_found_at_its_layer_alone(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path)
    result = study_anomaly(cache, progress=None, splits=1)
    injected, benign = distances(result, "injected"), distances(result, "benign")
    assert injected[2].auroc > 0.98
    for layer in (0, 1, 3):
        assert holds_chance(injected[layer].auroc_interval), injected[layer]
    for row in benign.values():
        assert holds_chance(row.auroc_interval), row
    assert injected[None].auroc > 0.9
    assert (injected[2].n_negative, injected[2].n_positive) == (QUESTIONS, QUESTIONS)
    # The last layer is as it was: what it says alone is chance.
    last = [row for row in result.table("detection").rows if row.features == "last layer"]
    assert {row.detector for row in last} == {"isolation forest", "local outlier factor",
                                              "one-class SVM", DISTANCE}  # fmt: skip
    assert abs(np.mean([row.auroc for row in last]) - 0.5) < 0.1
    # Paired with the baseline.
    trajectory = next(row for row in result.table("detection").rows if "logit" in row.features)
    assert trajectory.difference == pytest.approx(trajectory.auroc - injected[None].auroc)
    assert any("baseline beats the trajectories" in sentence for sentence in result.says)
    assert study_anomaly(cache, progress=None, splits=1) == result


def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path) -> None:
    result = study_anomaly(planted_cache(tmp_path, None), progress=None, splits=2)
    rows = result.table("detection").rows
    found = [holds_chance(row.auroc_interval) for row in rows]
    assert len(found) > 30
    # Some 5 % of the intervals miss chance, and rows of one cache go together.
    assert np.mean(found) > 0.8
    assert abs(np.mean([row.auroc for row in rows]) - 0.5) < 0.03


def test_the_distance_of_a_layer_is_that_of_scikit_learn_on_its_own_halves(
    tmp_path: Path,
) -> None:
    cache = planted_cache(tmp_path, size=1.5)
    result = study_anomaly(cache, progress=None, splits=2, seed=4)
    documents = choose_documents(cache, "all", 1, AnomalyLabels())
    halves = QuestionSplits.draw(documents, "clean", 2, 4)
    states = cache.residual_array(2)[np.arange(documents.count) * LENGTH + LENGTH - 1]
    values = []
    for of_fit in halves.fit:
        # No question is on both sides.
        assert not set(documents.question[of_fit]) & set(documents.question[~of_fit])
        distance = MahalanobisDistance(states[of_fit & halves.clean].astype(float))
        chosen = ~of_fit & (documents.arm != "benign")
        is_injected = documents.arm[chosen] == "injected"
        values.append(roc_auc_score(is_injected, distance.squared(states[chosen].astype(float))))
    found = distances(result, "injected")[2]
    assert found.auroc == pytest.approx(np.mean(values), abs=1e-9)
    assert found.shrinkage is not None


def test_a_classifier_loses_on_templates_that_its_training_lacks(tmp_path: Path) -> None:
    """Each template has a direction of its own, which the others do not teach."""
    cache = planted_cache(tmp_path, size=4.0)
    result = study_anomaly(cache, progress=None, splits=2)
    rows = [row for row in result.table("templates").rows if row.detector == CLASSIFIER]
    assert {row.template for row in rows} == set(TEMPLATES)
    for row in rows:
        if row.layer == 2:
            assert row.auroc > 0.9
            assert row.left_out < row.auroc - 0.2
            assert row.loss == pytest.approx(row.auroc - row.left_out)
    documents = choose_documents(cache, "all", 1, AnomalyLabels(template=None))
    halves = QuestionSplits.draw(documents, "clean", 1, 0)
    assert score_left_out({}, documents, halves, documents.arm == "injected") == []


def test_documents_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path, spoil=True)
    result = study_anomaly(cache, progress=None, splits=1)
    assert any("not finite" in note for note in result.notes)
    rows = result.table("detection").rows
    assert all(row.auroc is not None for row in rows)
    assert distances(result, "injected")[2].auroc > 0.98


def test_means_of_last_positions(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path)
    documents = choose_documents(cache, "all", 2, AnomalyLabels())
    values = documents.sample.positions.reshape(-1, 1).astype(float)
    starts = np.arange(documents.count) * LENGTH
    np.testing.assert_allclose(documents.mean_of_positions(values)[:, 0], starts + 1.5)
    np.testing.assert_array_equal(
        documents.sample.positions[documents.answer_rows], starts + LENGTH - 1
    )
    few = choose_documents(cache, "all", 2, AnomalyLabels(), max_positions=60, seed=1)
    assert few.count == 30
    assert few.n_questions == 10
    with pytest.raises(UsageError, match="fewer than 4"):
        choose_documents(cache, "all", 4, AnomalyLabels())


def test_caches_and_labels_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(NotFoundError, match="no label 'arm'"):
        study_anomaly(tiny_cache, progress=None)
    cache = planted_cache(tmp_path)
    with pytest.raises(NotFoundError, match="--clean"):
        study_anomaly(cache, progress=None, clean="normal")
    with pytest.raises(UsageError, match="no anomaly to find"):
        study_anomaly(LabelledCache(cache, {"arm": np.full(QUESTIONS * 3, "clean")}), progress=None)
    with pytest.raises(UsageError, match="need 10"):
        study_anomaly(cache, progress=None, max_positions=30)
    with pytest.raises(UsageError, match="splits"):
        study_anomaly(cache, progress=None, splits=0)
    with pytest.raises(UsageError, match="last positions"):
        study_anomaly(cache, progress=None, last=0)


@pytest.fixture(scope="module")
def injection_cache(model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Injections around lines of numbers, in a cache of answers."""
    folder = tmp_path_factory.mktemp("injection")
    rows = [
        {"text": f"one {n % 7}\nWhich {n}?\nsay {'red' if n % 2 else 'blue'}\n",
         "answer": "red" if n % 2 else "blue", "question": f"q{n}"}
        for n in range(40)
    ]  # fmt: skip
    source, out = folder / "questions.jsonl", folder / "injection.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_injection_data(source, out)
    return residua.extract(
        str(model_folder), str(out), root=folder / "root", pack=False, positions="answer",
        progress=None,
    )  # fmt: skip


def test_accuracy_and_attack_success_are_those_of_the_top_tokens(
    injection_cache: ActivationCache,
) -> None:
    cache = injection_cache
    labels = AnomalyLabels()
    documents = choose_documents(cache, "all", 1, labels)
    assert documents.count == 120
    assert documents.n_questions == 40
    text = documents.sample.text_tokens
    wanted = np.asarray(cache.label("wanted"))[documents.sequences]
    answers = np.asarray(cache.label("answer"))[documents.sequences]
    first_of = {str(word): int(token) for word, token in zip(answers, text, strict=True)}
    expected = np.array([first_of[str(word)] for word in wanted])
    for top in (text, expected):
        found = find_first_tokens(documents, labels, top)
        np.testing.assert_array_equal(found.answer, text)
        np.testing.assert_array_equal(found.wanted, expected)
    result = study_anomaly(cache, progress=None, splits=1)
    states = cache.residual_array(cache.n_blocks)[documents.sample.positions]
    top = np.asarray(cache.head.logits(states)).argmax(1)
    for row in result.table("outcomes").rows:
        if row.template != "all":
            continue
        of_arm = documents.arm == row.arm
        assert row.n == 40
        assert row.accuracy == pytest.approx((top == text)[of_arm].mean())
        assert row.success == pytest.approx((top == expected)[of_arm].mean())
    with pytest.raises(UsageError, match="only the positions of answers"):
        study_anomaly(cache, progress=None, last=2)


def test_options_make_features_of_their_own(injection_cache: ActivationCache) -> None:
    cache = injection_cache
    documents = choose_documents(cache, "all", 1, AnomalyLabels())
    tokens = find_option_tokens(cache, ["red", "blue"])
    lens = residua.LogitLens.of(cache, 0)
    sets, top = trajectory_features(documents, {"logit": lens}, tokens, "cpu", None)
    by_name = {features.name: features.values for features in sets}
    assert list(by_name) == ["logit trajectory", "logit options", "last layer"]
    layers = cache.n_blocks + 1
    assert by_name["logit trajectory"].shape == (documents.count, 2 * layers)
    for number, token in enumerate(tokens.values()):
        for layer in range(layers):
            logits = np.asarray(cache.head.logits(cache.residual_array(layer)[:]), np.float64)
            log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            positions = documents.sample.positions
            np.testing.assert_allclose(
                by_name["logit options"][:, number * layers + layer],
                log_q[positions, token],
                atol=1e-4,
            )
            np.testing.assert_allclose(
                by_name["logit trajectory"][:, layer],
                log_q[positions, top],
                atol=1e-4,
            )
            entropy = -(np.exp(log_q) * log_q).sum(1)[positions]
            np.testing.assert_allclose(
                by_name["logit trajectory"][:, layers + layer], entropy, atol=1e-4
            )
    np.testing.assert_array_equal(
        by_name["last layer"], by_name["logit trajectory"][:, [layers - 1, 2 * layers - 1]]
    )
    with pytest.raises(UsageError, match="tokens of their own"):
        find_option_tokens(cache, ["red", "red"])


def test_the_command_writes_tables_pictures_and_a_page(
    injection_cache: ActivationCache, tmp_path: Path
) -> None:
    root = injection_cache.path.parent
    words = ["study", "anomaly", injection_cache.id[:8], "--root", str(root), "--splits", "1"]
    page = tmp_path / "anomaly.html"
    files = ["--html", str(page), "--png", str(tmp_path / "png"), "--csv", str(tmp_path / "csv")]
    result = CliRunner().invoke(main, [*words, *files, "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert set(value["tables"]) == {"detection", "templates", "outcomes"}
    assert "benign insertion" in page.read_text()
    assert len(list((tmp_path / "png").glob("*.png"))) == len(value["figures"])
    shown = CliRunner().invoke(main, words)
    assert "Attack success" in shown.output
    wrong = CliRunner().invoke(main, [*words, "--arm", "side"])
    assert wrong.exit_code == 2
    assert "--arm" in wrong.output
