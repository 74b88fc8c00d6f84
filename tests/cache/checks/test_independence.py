"""Every row of a cache is what the model gives for its sequence alone, whatever it ran with."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.cache.checks.independence import (
    CHECKED_LENGTHS,
    Independence,
    choose_lengths,
    row_change,
)
from residua.cache.checks.model_checks import ModelReport, check_model, recheck_model
from residua.cache.errors import MismatchError, ModelError, ResiduaError
from residua.cache.format.layout import Layout
from residua.cache.format.manifest import (
    ALONE,
    BATCH,
    CaptureIdentity,
    Manifest,
    ModelIdentity,
    TokenIdentity,
)
from residua.cache.forward.write_parts import write_missing_parts
from residua.cache.model.blocks import DecoderBlocks, run_model
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.tokens.token_stream import TokenStream, from_sequences

from ...support import models
from ...support.architectures import KINDS, VOCAB, build_architecture
from ...support.toys import Toy
from ..extraction.test_architectures import REFUSED

TOLERANCE = 1e-4
"""Largest change of a row relative to its norm that is rounding, float32."""
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 63, 65, 90, 129, 180)
"""Around the windows, chunks and sparse choices of 16 positions that the tiny models have."""


def mixed_stream(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, copies: int = 1) -> TokenStream:
    """`copies` sequences of each length, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.repeat(lengths, copies))
    return from_sequences([rng.integers(3, VOCAB - 1, int(length)) for length in order])


def cache_of(
    model: torch.nn.Module,
    stream: TokenStream,
    root: Path,
    batch_tokens: int = 1024,
    pad: bool | None = None,
) -> tuple[ActivationCache, ModelReport]:
    """A complete cache of `stream`, by the checks and the runner of an extraction.

    `pad` puts lengths together, or apart, whatever the checks say.
    """
    report = check_model(model, stream, "float32", "float32", batch_tokens=batch_tokens)
    digest, hashes = stream.digests()
    extra: dict[str, Any] = {"pad": report.pad if pad is None else pad, "causal": report.causal}
    if report.alone:
        extra[BATCH] = ALONE
    manifest = Manifest(
        ModelIdentity("0" * 64, "0" * 64, type(model).__name__),
        TokenIdentity(digest, stream.positions, stream.sequences, "0" * 64, 512, False, 0),
        CaptureIdentity("float32", "float32", "default"),
        Layout(64, 1024),
        report.head.d_model,
        report.head.vocab,
        report.stack.depth,
        batch_tokens,
        "tiny",
        "random",
        extra,
    )
    path = create_cache(root, manifest, stream, hashes, report.dtypes, report.head.save, {})
    cache = ActivationCache(path)
    write_missing_parts(cache, report.stack)
    return ActivationCache(path), report


def largest_row_change(
    cache: ActivationCache, stack: DecoderBlocks, fresh_model: torch.nn.Module
) -> float:
    """Largest relative change of any row from a fresh copy of the model on its sequence alone."""
    worst = 0.0
    layers = [np.asarray(cache.residual(layer)[:]) for layer in cache.layers]
    for start, length in zip(cache.sequence_start, cache.sequence_length, strict=True):
        rows = slice(int(start), int(start) + int(length))
        ids = torch.from_numpy(np.asarray(cache.tokens[rows]).astype(np.int64))[None]
        for layer, expected in enumerate(layers_of_sequence_alone(stack, fresh_model, ids)):
            change = np.linalg.norm(layers[layer][rows] - expected, axis=-1)
            norm = np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
            worst = max(worst, float((change / norm).max()))
    return worst


def layers_of_sequence_alone(
    stack: DecoderBlocks, fresh_model: torch.nn.Module, ids: torch.Tensor
) -> list[np.ndarray]:
    """All layers of one sequence by a copy of `fresh_model`, which has read nothing before."""
    model = copy.deepcopy(fresh_model)
    names = {module: name for name, module in stack.model.named_modules()}
    blocks = [model.get_submodule(names[block]) for block in stack.blocks]
    with torch.inference_mode():
        layers = DecoderBlocks(
            model, stack.name, blocks, stack.axes, stack.stream_indices
        ).residuals(ids)
    return [layer[0].float().numpy() for layer in layers]


def check_every_row(model: torch.nn.Module, stream: TokenStream, root: Path) -> ModelReport:
    """Extract and compare every sequence; returns what was measured of the model."""
    fresh_model = copy.deepcopy(model)
    cache, report = cache_of(model, stream, root)
    assert largest_row_change(cache, report.stack, fresh_model) <= TOLERANCE
    return report


SHORT = (1, 3, 9, 15, 17, 20, 33, 40)
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
}
KEPT_APART: dict[str, tuple[str, dict[str, Any]]] = {
    "long rotary frequencies": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "dynamic rotary frequencies": (
        "llama",
        {
            "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
}
"""Models whose rows change with the width of the batch, whatever the mask says."""


@pytest.mark.parametrize("name", KEPT_APART)
@pytest.mark.filterwarnings("ignore")
def test_lengths_are_kept_apart_where_the_width_of_a_batch_changes_its_rows(
    name: str, tmp_path: Path
) -> None:
    kind, fields = KEPT_APART[name]
    report = check_every_row(
        build_architecture(kind, noise=0.3, **fields), mixed_stream(SHORT, copies=2), tmp_path
    )
    assert not report.pad
    assert not report.alone


@pytest.mark.parametrize("kind", ["axk2", "glm_moe_dsa", "deepseek_v32"])
@pytest.mark.filterwarnings("ignore")
def test_sequences_run_alone_where_a_few_of_all_positions_are_chosen(
    kind: str, tmp_path: Path
) -> None:
    if kind not in KINDS:
        pytest.skip("not in this version of transformers")
    report = check_every_row(build_architecture(kind), mixed_stream(SHORT), tmp_path)
    assert report.alone
    assert isinstance(report.independence, Independence)
    assert report.independence.choice == "topk 16 of 40"


@pytest.mark.filterwarnings("ignore")
def test_a_choice_that_takes_all_positions_is_none(tmp_path: Path) -> None:
    report = check_model(
        build_architecture("axk2"), mixed_stream((5, 12, 16)), "float32", "float32"
    )
    assert isinstance(report.independence, Independence)
    assert report.independence.choice is None


@pytest.mark.parametrize("kind", ["mistral", "llama4_text", "gemma3_text", "mamba2", "mixtral"])
@pytest.mark.filterwarnings("ignore")
def test_windows_chunks_recurrences_and_experts_share_batches(kind: str, tmp_path: Path) -> None:
    assert not check_every_row(build_architecture(kind), mixed_stream(SHORT), tmp_path).alone


class Late(Toy):
    """Spoils what `spoil` says in sequences of more than 60 tokens, which no short check sees."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().blocks_of(self.spoil(hidden) if hidden.shape[1] > 60 else hidden)

    def spoil(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class WidthMatters(Late):
    def spoil(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1


class BatchMatters(Late):
    def spoil(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1 * len(hidden)


class LaterMatters(Late):
    def spoil(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1 * hidden.flip(1)


class NeighbourMatters(Late):
    def embed_all(self, ids: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.embed(ids)) if ids.shape[1] > 60 else self.embed(ids)

    def spoil(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.roll(1, 1)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        hidden = Toy.blocks_of(self, self.embed_all(input_ids))
        return SimpleNamespace(logits=self.tail(hidden, input_ids))


class Remembers(Toy):
    """Reads a sequence otherwise after a longer one."""

    longest = 0

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, hidden.shape[1])
        return super().blocks_of(hidden + 0.01 * self.longest)


class RemembersInPlace(Toy):
    """The same, where only the module itself could put it back."""

    def __init__(self) -> None:
        super().__init__()
        self.read = [0]

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        self.read[0] = max(self.read[0], hidden.shape[1])
        return super().blocks_of(hidden + 0.01 * self.read[0])


LATE = (3, 50, 70, 90)


def test_what_begins_beyond_the_length_of_the_short_checks_is_seen() -> None:
    def measured(model: torch.nn.Module) -> ModelReport:
        return check_model(model, mixed_stream(LATE, copies=2), "float32", "float32")

    sound = measured(Toy())
    assert (sound.pad, sound.alone, sound.causal, sound.embedding) == (True, False, True, True)
    assert not measured(WidthMatters()).pad
    assert not measured(WidthMatters()).alone
    assert measured(BatchMatters()).alone
    assert not measured(LaterMatters()).causal
    assert not measured(NeighbourMatters()).embedding


@pytest.mark.parametrize("model", [WidthMatters, BatchMatters, Remembers])
def test_rows_are_those_of_the_sequence_alone(model: type[Toy], tmp_path: Path) -> None:
    check_every_row(model(), mixed_stream(LATE, copies=2), tmp_path)


def test_a_model_that_cannot_be_put_back_is_refused() -> None:
    with pytest.raises(ModelError, match="is not deterministic"):
        check_model(RemembersInPlace(), mixed_stream(LATE), "float32", "float32")


def test_a_forward_pass_leaves_the_model_as_it_was() -> None:
    model = Remembers()
    run_model(model, torch.ones(1, 9, dtype=torch.long))
    assert "longest" not in vars(model)


def test_lengths_that_no_two_sequences_share_a_batch_in_are_not_run_together() -> None:
    stream = mixed_stream((3, 70, 90), copies=2)
    assert not check_model(WidthMatters(), stream, "float32", "float32", batch_tokens=140).pad
    assert check_model(WidthMatters(), stream, "float32", "float32", batch_tokens=139).pad


def test_one_changed_row_is_not_hidden_by_rows_of_huge_values() -> None:
    rows = torch.ones(1, 50, 8)
    rows[0, 0] = 1e5  # a sink
    changed = rows.clone()
    changed[0, 7, 0] += 0.5
    assert row_change(rows, changed, torch.float32) == pytest.approx(0.5 / 8**0.5)
    assert row_change(rows, changed, torch.bfloat16) == pytest.approx(0.5 / 8**0.5 / 50**0.5)
    changed[0, 7, 0] = torch.nan
    assert row_change(rows, changed, torch.float32) == torch.inf


def test_lengths_around_every_constant_are_chosen() -> None:
    lengths = np.array([1, 10, 63, 64, 65, 100, 500, 511, 512, 600])
    chosen = choose_lengths(lengths, [64, 511])
    assert {1, 600, 64, 65, 511, 512} <= set(chosen)
    many = choose_lengths(np.arange(1, 5000), list(range(10, 4000, 7)))
    assert len(many) <= CHECKED_LENGTHS
    assert many[0] == 4999


def test_a_cache_whose_rows_depended_on_their_batch_is_not_continued(tmp_path: Path) -> None:
    model = WidthMatters()
    cache, _ = cache_of(model, mixed_stream(LATE, copies=2), tmp_path / "right")
    recheck_model(model, cache)
    wrong, _ = cache_of(model, mixed_stream(LATE, copies=2), tmp_path / "wrong", pad=True)
    with pytest.raises(MismatchError, match="padding changes a row.*into another root"):
        recheck_model(model, wrong)
    alone, _ = cache_of(BatchMatters(), mixed_stream(LATE), tmp_path / "alone")
    recheck_model(BatchMatters(), alone)
    vars(alone.manifest)["extra"].pop(BATCH)
    with pytest.raises(MismatchError, match="other rows of the batch"):
        recheck_model(BatchMatters(), alone)


@pytest.mark.filterwarnings("ignore")
def test_longer_sequences_that_are_added_are_checked_again(tmp_path: Path) -> None:
    kind, fields = KEPT_APART["long rotary frequencies"]
    model: Any = build_architecture(kind, noise=0.3, vocab_size=models.VOCAB, **fields)
    folder, texts = tmp_path / "model", tmp_path / "texts.jsonl"
    model.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    rows = [" ".join(["the cat sat on a mat"[: 3 * n]]) for n in range(1, 6)]
    options: dict[str, Any] = {"root": tmp_path / "root", "pack": False, "dtype": "float32"}

    def extract(documents: list[str]) -> ActivationCache:
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return residua.extract(folder, texts, **options)

    short = extract(rows)
    assert short.sequence_length.max() <= 16
    assert short.manifest.pad
    longer = extract([*rows, "a red dog ran under the big blue tree and sat " * 2, "the dog"])
    assert longer.manifest.extra["extends"] == short.id
    assert longer.sequence_length.max() > 16
    assert not longer.manifest.pad
    report = check_model(model, mixed_stream((4,)), "float32", "float32")
    assert (
        largest_row_change(
            longer,
            report.stack,
            build_architecture(kind, noise=0.3, vocab_size=models.VOCAB, **fields),
        )
        <= TOLERANCE
    )


def test_a_context_that_the_model_cannot_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot run on a sequence of 600 tokens.*--context"):
        check_model(build_architecture("gpt2"), mixed_stream((4, 600)), "float32", "float32")


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.filterwarnings("ignore")
def test_positions_that_padding_takes_are_no_context(
    kind: str, texts_file: Path, tmp_path: Path
) -> None:
    model: Any = build_architecture(
        kind, vocab_size=models.VOCAB, max_position_embeddings=66, pad_token_id=1, is_decoder=True
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    cache = residua.extract(folder, texts_file, root=tmp_path / "root", max_tokens=400)
    assert cache.sequence_length.max() == 64


WHOLE_CHUNKS = {"reformer": 64}
"""Kinds that pad a longer sequence inside, to whole chunks of so many tokens: refused there."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_class_gives_each_sequence_its_own_rows(kind: str, tmp_path: Path) -> None:
    try:
        model: Any = build_architecture(kind)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    lengths = LENGTHS
    if getattr(model.config, "max_position_embeddings", 512) <= max(lengths):
        lengths = tuple(n for n in lengths if n <= 120)
    if kind in REFUSED:
        with pytest.raises(ResiduaError):
            check_every_row(model, mixed_stream(lengths), tmp_path)
        return
    if kind in WHOLE_CHUNKS:
        with pytest.raises(ModelError, match="shorter --context"):
            check_every_row(model, mixed_stream(lengths), tmp_path)
        lengths = tuple(n for n in lengths if n <= WHOLE_CHUNKS[kind])
    check_every_row(model, mixed_stream(lengths), tmp_path)
