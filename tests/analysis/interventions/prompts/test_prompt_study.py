"""What prompts read is known in a model whose layer 1 alone carries the step of its text."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.analysis.interventions.prompts import prompt_readings
from residua.analysis.interventions.prompts.passage_picture import read_passage
from residua.analysis.interventions.prompts.prompt_readings import other_samples
from residua.analysis.interventions.prompts.prompt_rows import PromptRow
from residua.analysis.interventions.prompts.prompt_study import study_prompts
from residua.analysis.studies.results.study_result import StudyResult
from residua.cache.errors import MismatchError, UsageError
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.prompts.learned_prompt import LearnedPrompt
from residua.probes.prompts.patched_prompt import PatchedPrompt

from ....support.strides import LENGTH, NUMBERS, counting_cache, counting_model

PROMPT = PatchedPrompt("numbers", (3, 7))
CHANCE = 1 / (NUMBERS - 1)


@pytest.fixture(scope="module")
def model() -> ResumableModel:
    return counting_model()


@pytest.fixture(scope="module")
def cache(model: ResumableModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return counting_cache(tmp_path_factory.mktemp("counting"), model)


def positions_with_a_step(cache: ActivationCache) -> np.ndarray:
    """Positions from the second token of a text on: the step is known there."""
    return np.tile(np.arange(LENGTH) >= 1, cache.positions // LENGTH)


@pytest.fixture(scope="module")
def study(cache: ActivationCache, model: ResumableModel) -> StudyResult:
    return study_prompts(
        cache,
        prompts=[PROMPT],
        model=model,
        split="all",
        offsets=(0, 1, 2),
        where=positions_with_a_step(cache),
        max_positions=400,
        free=True,
        progress=None,
    )


def row_of(study: StudyResult, layer: int, offset: int, mode: str = "forced") -> PromptRow:
    (row,) = (
        row
        for row in study.table("prompts").rows
        if (row.layer, row.offset, row.mode) == (layer, offset, mode)
    )
    return row


def test_layer_1_says_the_token_after_the_next_and_shuffled_states_are_at_chance(
    study: StudyResult,
) -> None:
    row = row_of(study, 1, 1)
    assert row.n == 400
    assert row.precision == row.text_precision == 1.0
    assert row.surprisal is not None
    assert row.surprisal < 0.01
    # A state of another text has one of ten steps.
    assert row.shuffled is not None
    assert abs(row.shuffled - CHANCE) < 4 * np.sqrt(CHANCE * (1 - CHANCE) / 400)
    assert row.gain_interval[0] is not None
    assert row.gain_interval[0] > 0.8
    # The next token alone says nothing of the step.
    assert row.bigram is not None
    assert row.bigram < 0.3
    assert row.lead_interval[0] is not None
    assert row.lead_interval[0] > 0.5


def test_other_layers_and_offsets_add_nothing_to_the_given_tokens(study: StudyResult) -> None:
    for layer in (0, 2):
        row = row_of(study, layer, 1)
        assert row.gain is not None
        assert abs(row.gain) < 0.1
    # Behind the last layer no block runs: the state does not reach the next token at all.
    assert row_of(study, 2, 1).gain == 0.0
    # At N = 2 the step is found between x[t] and x[t+1]: layer 0 brings x[t] to the first block.
    assert row_of(study, 0, 2).precision == 1.0
    # A state of layer 1 comes too late: that block saw the prompt's own last token.
    row = row_of(study, 1, 2)
    assert row.gain is not None
    assert abs(row.gain) < 0.1
    assert row_of(study, 2, 0).precision == 1.0


def test_free_running_prompts_need_their_own_first_token(study: StudyResult) -> None:
    """The prompt has no step for t itself, so that it goes on from a wrong token."""
    first = row_of(study, 1, 0, "free")
    assert first.precision == row_of(study, 1, 0).precision
    later = row_of(study, 1, 1, "free")
    assert later.precision is not None
    assert later.precision < 0.5
    assert row_of(study, 2, 0, "free").precision == 1.0


def test_rows_are_those_of_plain_numpy(
    study: StudyResult, cache: ActivationCache, model: ResumableModel
) -> None:
    """Measures of layer 1, N = 1, sample by sample in float64."""
    from residua.probes.prompts.prompt_sample import PromptSample

    where = positions_with_a_step(cache)
    sample = PromptSample.draw(cache, "all", 2, 400, where=where)
    surprisal, nll, kl = [], [], []
    for number in range(0, 400, 37):
        tokens = np.array([*PROMPT.ids, sample.continuations[number, 0]])
        state = sample.states(1)[number]

        def put_in(stream, state=state):  # noqa: ANN001
            stream = stream.clone()
            stream[:, 1] = stream.new_tensor(state)
            return stream

        q = model.run(tokens, changes={1: put_in})[-1].double().numpy()
        p = cache.head.logits(sample.last_states(1)[number : number + 1])[0].astype(np.float64)
        log_q, log_p = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (q, p))
        surprisal.append(-log_p[q.argmax()])
        nll.append(-log_q[p.argmax()])
        kl.append((np.exp(log_p) * (log_p - log_q)).sum())
    row = row_of(study, 1, 1)
    # All samples are alike here: each token is certain to the same degree.
    assert row.surprisal == pytest.approx(np.mean(surprisal), abs=1e-5)
    assert row.nll == pytest.approx(np.mean(nll), abs=1e-5)
    assert row.kl == pytest.approx(np.mean(kl), abs=1e-5)


def test_readings_do_not_depend_on_batches(
    study: StudyResult,
    cache: ActivationCache,
    model: ResumableModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_readings, "batch_rows", lambda *_: 7)
    again = study_prompts(
        cache,
        prompts=[PROMPT],
        model=model,
        split="all",
        offsets=(0, 1, 2),
        where=positions_with_a_step(cache),
        max_positions=400,
        rivals=False,
        progress=None,
    )
    for row in again.table("prompts").rows:
        other = row_of(study, row.layer, row.offset)
        assert (row.precision, row.shuffled) == (other.precision, other.shuffled)
        assert row.surprisal == pytest.approx(other.surprisal, rel=1e-5)


def test_a_page_has_the_passage(study: StudyResult, tmp_path: Path) -> None:
    assert [figure.name for figure in study.figures] == ["precision", "surprisal", "passage"]
    assert any("layer 1, precision@1 1.000" in sentence for sentence in study.says)
    page = study.write_html(tmp_path / "study.html", "residua intervene prompt")
    assert "States read by a prompt" in page.read_text()


def test_cells_of_a_passage_are_generated_token_by_token(
    cache: ActivationCache, model: ResumableModel
) -> None:
    cells = read_passage(
        cache, model, {1: PROMPT, 2: PROMPT}, sequence=4, first=2, tokens=5, generated=3
    )
    assert cells.tokens.shape == (2, 5, 3)
    start = int(cache.sequence_start[4]) + 2
    for column in range(5):
        state = cache.residual_array(1)[start + column]
        read: list[int] = []
        for step in range(3):

            def put_in(stream, state=state):  # noqa: ANN001
                stream = stream.clone()
                stream[:, 1] = stream.new_tensor(np.asarray(state))
                return stream

            logits = model.run(np.array([*PROMPT.ids, *read]), changes={1: put_in})[-1]
            read.append(int(logits.argmax()))
            probability = float(logits.softmax(-1).max())
            np.testing.assert_allclose(cells.probabilities[0, column, step], probability, atol=1e-6)
        assert cells.tokens[0, column].tolist() == read
    with pytest.raises(UsageError, match="there is nothing to read from token 90 on"):
        read_passage(cache, model, {1: PROMPT}, sequence=4, first=90)


def test_other_samples_are_a_permutation_without_own_documents() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(0, 9, 200)
    other = other_samples(units, 1)
    assert sorted(other.tolist()) == list(range(200))
    assert (units[other] != units).all()
    alone = other_samples(np.zeros(5, int), 1)
    assert (alone != np.arange(5)).all()
    assert other_samples(np.zeros(1, int), 1).tolist() == [0]


def test_states_that_are_not_finite_do_not_count(model: ResumableModel, tmp_path: Path) -> None:
    cache = counting_cache(tmp_path, model, texts=8, spoilt=LENGTH + 4)
    found = study_prompts(
        cache,
        prompts=[PROMPT],
        model=model,
        split="all",
        layers=1,
        offsets=1,
        where=positions_with_a_step(cache),
        rivals=False,
        passage=1,
        passage_tokens=8,
        progress=None,
    )
    (row,) = found.table("prompts").rows
    assert row.n == found.subject.n - 1
    assert row.precision == 1.0
    assert any("1 readings have logits that are not finite" in note for note in found.notes)


def test_one_position_of_one_document_has_no_interval(
    model: ResumableModel, tmp_path: Path
) -> None:
    cache = counting_cache(tmp_path, model, texts=1)
    found = study_prompts(
        cache,
        prompts=[PROMPT],
        model=model,
        split="all",
        layers=1,
        offsets=1,
        where=positions_with_a_step(cache),
        max_positions=1,
        rivals=False,
        progress=None,
    )
    (row,) = found.table("prompts").rows
    assert (row.n, row.precision) == (1, 1.0)
    assert row.precision_interval == (None, None)
    assert "no interval" in found.says[0]
    empty = [split for split in ("train", "validation", "test") if not len(cache.sequences(split))]
    assert len(empty) == 2
    for split in empty:
        with pytest.raises(UsageError, match=f"the split '{split}' has no position with 1 more"):
            study_prompts(cache, prompts=[PROMPT], model=model, split=split, offsets=1)


def test_what_cannot_be_read_is_refused(cache: ActivationCache, model: ResumableModel) -> None:
    for options, message in (
        ({"offsets": (-1,)}, "offsets of 0 or more"),
        ({"target_layer": 5}, "can be put in at layers 0 to 2, not 5"),
        ({"passage": 999}, "the cache has sequences 0 to 59, not 999"),
        ({"prompts": []}, "there is no prompt to read"),
    ):
        arguments = {"prompts": [PROMPT], "model": model, "rivals": False, "split": "all"}
        with pytest.raises(UsageError, match=message):
            study_prompts(cache, progress=None, **{**arguments, **options})


def test_learned_prompts_of_another_model_are_refused(
    cache: ActivationCache, model: ResumableModel, tiny_cache: ActivationCache
) -> None:
    probe = LearnedPrompt(layers=1, steps=2, tokens=2, lr=0.1).fit(cache, model, progress=None)
    with pytest.raises(MismatchError):
        study_prompts(tiny_cache, [probe], progress=None)
    named = {"mine": probe, "unigram": residua.Unigram(offsets=(1,)).fit(cache, progress=None)}
    found = study_prompts(
        cache, named, prompts=[], model=model, offsets=1, split="all", progress=None, rivals=False
    )
    assert {row.prompt for row in found.table("prompts").rows} == {"mine"}
    assert {row.probe for row in found.table("probes").rows} == {"unigram"}
