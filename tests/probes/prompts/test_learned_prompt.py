"""Learned prompts lower their KL, are saved, and go on to the same embeddings after a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.errors import CorruptError, MismatchError, NotFoundError, UsageError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.resuming.resumable_model import ResumableModel
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.prompts import prompt_descent
from residua.probes.prompts.learned_prompt import LearnedPrompt, model_of_cache
from residua.probes.prompts.prompt_descent import group_pairs

OPTIONS: dict[str, Any] = {
    "layers": 1,
    "offsets": 1,
    "tokens": 3,
    "steps": 50,
    "batch": 8,
    "positions": 200,
    "validation_positions": 24,
    "lr": 0.1,
}


@pytest.fixture(scope="module")
def model(tiny_cache: ActivationCache) -> ResumableModel:
    return model_of_cache(tiny_cache, None, "cpu")


@pytest.fixture(scope="module")
def probe(tiny_cache: ActivationCache, model: ResumableModel) -> LearnedPrompt:
    return LearnedPrompt(**OPTIONS).fit(tiny_cache, model, progress=None)


def test_a_fit_lowers_the_kl_and_is_saved(
    tiny_cache: ActivationCache, probe: LearnedPrompt, tmp_path: Path
) -> None:
    (row,) = probe.metrics()
    assert row["kl"] < row["kl_before"]
    loaded = residua.load_probe(probe.save(tmp_path / "prompt"))
    assert isinstance(loaded, LearnedPrompt)
    assert loaded.metrics() == probe.metrics()
    assert loaded.placeholders_ == probe.placeholders_
    np.testing.assert_array_equal(loaded.embeddings_[0], probe.embeddings_[0])
    loaded.check_model(tiny_cache)
    loaded.model_ = "1" * 64
    with pytest.raises(MismatchError, match="a prompt says something to its own model alone"):
        loaded.check_model(tiny_cache)
    with pytest.raises(NotFoundError, match="no prompt was fitted for layer 2, offset 1"):
        loaded.prompt(2, 1)
    config = tmp_path / "prompt" / "config.json"
    write_json(config, {**read_json(config), "placeholders": [-1, 2, 3]})
    with pytest.raises(CorruptError, match="the placeholders are no token ids"):
        residua.load_probe(tmp_path / "prompt")


def test_a_killed_fit_goes_on_to_the_same_embeddings(
    tiny_cache: ActivationCache,
    model: ResumableModel,
    probe: LearnedPrompt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, measure = 0, prompt_descent._measure

    def fail_later(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        measure(*arguments)

    monkeypatch.setattr(prompt_descent, "_measure", fail_later)
    folder = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        LearnedPrompt(**OPTIONS).fit(tiny_cache, model, checkpoint=folder, progress=None)
    other = LearnedPrompt(**{**OPTIONS, "batch": 9})
    with pytest.raises(MismatchError, match="of another fit"):
        other.fit(tiny_cache, model, checkpoint=folder, progress=None)
    again = LearnedPrompt(**OPTIONS).fit(tiny_cache, model, checkpoint=folder, progress=None)
    assert calls == 4
    assert not folder.exists()
    np.testing.assert_array_equal(again.embeddings_[0], probe.embeddings_[0])
    assert again.metrics() == probe.metrics()


def test_the_loss_is_the_kl_of_plain_float64(
    tiny_cache: ActivationCache, model: ResumableModel, probe: LearnedPrompt
) -> None:
    from residua.probes.prompts.prompt_descent import DescentSettings, PromptTask
    from residua.probes.prompts.prompt_sample import PromptSample

    sample = PromptSample.draw(tiny_cache, "validation", 2, 5)
    prompt = probe.prompt(1, 1)
    settings = DescentSettings(1, 8, 0.1, 0.0, 0, 1)
    head = tiny_cache.head.torch("cpu")
    task = PromptTask(model, head, prompt, (1,), (1, 2), sample, sample, settings)
    embeddings = torch.from_numpy(probe.embeddings_[0])
    found = float(task.loss(embeddings, sample, 1, np.arange(5)))
    total = 0.0
    for number in range(5):
        tokens = np.array([*prompt.ids, *sample.continuations[number]])

        def first(stream: torch.Tensor) -> torch.Tensor:
            return torch.cat([embeddings[None], stream[:, 3:]], 1)

        def put_in(stream: torch.Tensor, number: int = number) -> torch.Tensor:
            stream = stream.clone()
            stream[:, 2] = torch.from_numpy(sample.states(1)[number])
            return stream

        q = model.run(tokens, changes={0: first, 1: put_in}).double().log_softmax(-1)
        for offset in (1, 2):
            p = tiny_cache.head.logits(sample.last_states(offset)[number : number + 1])[0]
            log_p = torch.from_numpy(p).double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - q[2 + offset])).sum())
    np.testing.assert_allclose(found, total / 10, rtol=1e-4)


def test_pairs_share_prompts() -> None:
    assert group_pairs((1, 2), (1, 3), "none") == [
        ((1,), (1,)),
        ((1,), (3,)),
        ((2,), (1,)),
        ((2,), (3,)),
    ]
    assert group_pairs((1, 2), (1, 3), "offsets") == [((1,), (1, 3)), ((2,), (1, 3))]
    assert group_pairs((1, 2), (1, 3), "all") == [((1, 2), (1, 3))]


def test_one_prompt_serves_all_pairs_and_a_sweep_finds_the_rate(
    tiny_cache: ActivationCache, model: ResumableModel
) -> None:
    options = {**OPTIONS, "layers": (0, 1), "offsets": (0, 1), "steps": 3, "lr": None}
    shared = LearnedPrompt(**options, share="all").fit(tiny_cache, model, progress=None)
    assert list(shared.embeddings_) == [0]
    assert shared.pairs() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {row["lr"] for row in shared.metrics()} <= set(prompt_descent.SWEEP_RATES)


def test_wrong_parameters_are_refused(tiny_cache: ActivationCache, model: ResumableModel) -> None:
    for options, message in (
        ({"layers": 3}, "layer 3 is the last one"),
        ({"offsets": -1}, "offsets of 0 or more"),
        ({"share": "layers"}, "share must be one of none, offsets, all"),
        ({"tokens": 0}, "tokens must be 1 or more, not 0"),
        ({"lr": -1.0}, "lr must be a number above 0"),
        ({"tokens": 1000}, "prompt and continuation have 1001 tokens, the model reads at most 128"),
    ):
        with pytest.raises(UsageError, match=message):
            LearnedPrompt(**{**OPTIONS, **options}).fit(tiny_cache, model, progress=None)
    with pytest.raises(UsageError, match="a prompt is fitted on a cache"):
        LearnedPrompt().fit(np.zeros((3, 4)))  # pyright: ignore[reportArgumentType]
