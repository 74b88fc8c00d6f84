"""Greedy continuations are those of a plain argmax loop, for several models and any batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.studies.future_lens import study_future_lens
from residua.analysis.studies.texts.continuations import (
    ContextChoice,
    choose_prompts,
    write_continuations,
)
from residua.analysis.studies.texts.greedy_tokens import GreedyModel
from residua.cache.errors import DataError, UsageError
from residua.cache.tokens.token_stream import from_sequences
from residua.probes.lens.logit_lens import LogitLens

from ....support.models import VOCAB, build_model
from ....support.toys import Toy

LENGTHS = (3, 17, 1, 9)
TOKENS = 6
SLOW = ("gpt_neox", "opt", "mpt", "gptj", "falcon", "gemma2", "phi")


def prompts(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length) for length in LENGTHS]


def plain_continuation(model: torch.nn.Module, prompt: np.ndarray, tokens: int) -> list[int]:
    """One whole forward pass for each token, one prompt by itself."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(np.argmax(logits.float().numpy())))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "llama", "bloom", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)],
)
def test_a_batch_is_continued_as_a_plain_loop_does_prompt_by_prompt(kind: str) -> None:
    model = build_model(kind)
    greedy = GreedyModel(model)
    found = greedy.continue_greedily(prompts(), TOKENS)
    assert greedy.way == "cached"
    for row, prompt in zip(found, prompts(), strict=True):
        assert row.tolist() == plain_continuation(model, prompt, TOKENS)
    # A batch of one, and a later batch, are the same.
    for row, prompt in zip(found, prompts(), strict=True):
        alone = greedy.continue_greedily([prompt], TOKENS)
        assert alone[0].tolist() == row.tolist()


@pytest.mark.parametrize("kind", ["mamba", "toy"])
def test_a_model_without_such_a_cache_runs_without_it(kind: str) -> None:
    model = Toy() if kind == "toy" else build_model(kind)
    greedy = GreedyModel(model)
    found = greedy.continue_greedily(prompts(), TOKENS)
    assert greedy.way == "plain"
    for row, prompt in zip(found, prompts(), strict=True):
        assert row.tolist() == plain_continuation(model, prompt, TOKENS)


def test_a_model_that_reads_its_padding_is_run_without_a_cache() -> None:
    class Careless(torch.nn.Module):
        """A GPT-2 that forgets its attention mask and positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = build_model("gpt2")

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            options.pop("attention_mask", None)
            return self.inner(input_ids=input_ids, **options)

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

    model = Careless()
    greedy = GreedyModel(model)
    found = greedy.continue_greedily(prompts(), TOKENS)
    assert greedy.way == "plain"
    for row, prompt in zip(found, prompts(), strict=True):
        assert row.tolist() == plain_continuation(model, prompt, TOKENS)


def test_prompts_without_a_token_are_refused_and_no_prompt_is_no_row() -> None:
    greedy = GreedyModel(build_model("gpt2"))
    with pytest.raises(UsageError, match="a prompt has one token"):
        greedy.continue_greedily([np.zeros(0, np.int64)], 2)
    assert greedy.continue_greedily([], 2).shape == (0, 2)


def test_lengths_are_drawn_by_document_between_the_least_and_what_fits() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 200)
    stream = from_sequences([rng.integers(0, 9, length) for length in lengths])
    choice = ContextChoice(contexts=1000, least_context=20, tokens=4, window=40, seed=1)
    chosen = choose_prompts(stream, choice)
    assert len(chosen) == (lengths >= 20).sum()
    sizes = np.array([len(prompt.ids) for prompt in chosen])
    assert sizes.min() >= 20
    assert sizes.max() <= 36
    assert len(set(sizes.tolist())) > 10
    for prompt in chosen:
        whole = stream.sequence(prompt.document)
        np.testing.assert_array_equal(prompt.ids, whole[: len(prompt.ids)])
        np.testing.assert_array_equal(prompt.text, whole[len(prompt.ids) :][:4])
    few = choose_prompts(stream, ContextChoice(3, 20, 4, 40, seed=1))
    assert [len(prompt.ids) for prompt in few] == sizes[:3].tolist()


@pytest.fixture(scope="module")
def continued(
    model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("continued") / "continued.jsonl"
    value = write_continuations(
        str(model_folder),
        str(texts_file),
        out,
        root=out.parent,
        tokens=5,
        least_context=12,
        contexts=40,
        batch=3,
        progress=None,
    )
    return out, value


def test_rows_hold_ids_positions_and_how_much_is_the_texts_own(
    continued: tuple[Path, dict[str, Any]],
) -> None:
    out, value = continued
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == value["rows"] == 40
    assert value["way"] == "cached"
    assert [path.name for path in out.parent.glob("*continued*")] == ["continued.jsonl"]
    for row in rows:
        assert row["positions"] == list(range(row["prefix_len"] - 1, row["prefix_len"] + 4))
        assert len(row["input_ids"]) == row["prefix_len"] + 5
        assert row["text"].endswith(row["continuation"])
        assert 0 <= row["matches"] <= 5


def test_the_cache_of_the_continuations_agrees_with_itself_through_every_offset(
    continued: tuple[Path, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    """At T the study reads exactly N = 0 to 3, and the model's tokens there are the row's."""
    cache = residua.extract(
        str(model_folder),
        str(continued[0]),
        root=tmp_path,
        pack=False,
        text_column="input_ids",
        positions="explicit",
        dtype="float32",
        progress=None,
    )
    assert cache.positions == 40 * 5
    assert set(cache.label_names) >= {"prefix_len", "matches", "document"}
    result = study_future_lens(
        cache,
        [LogitLens([1], (0, 1, 2, 3))],
        split="all",
        keep="agree",
        first_only=True,
        progress=None,
    )
    for row in result.table("kept").rows:
        assert row.pairs == 40
        assert row.share == 1.0
    rows = [row for row in result.table("measures").rows if row.probe == "logit"]
    assert [(row.offset, row.n) for row in rows] == [(0, 40), (1, 40), (2, 40), (3, 40)]
    for row in rows:
        assert row.precision_at_1 == row.precision_at_1_text


def test_lengths_without_room_and_short_texts_are_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"root": tmp_path, "progress": None}
    with pytest.raises(UsageError, match="give --least-context 117 or less"):
        write_continuations(str(model_folder), str(texts_file), tmp_path / "a.jsonl", **options)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "the cat"}\n')
    with pytest.raises(DataError, match=r"no document .* has 30 tokens \(the longest has"):
        write_continuations(
            str(model_folder), str(short), tmp_path / "a.jsonl", least_context=30, **options
        )
    with pytest.raises(UsageError, match="name it"):
        write_continuations(str(model_folder), str(short), tmp_path / "a.txt", **options)
    assert not list(tmp_path.glob("*a.jsonl*"))
