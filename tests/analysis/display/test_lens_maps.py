"""Cells of lens maps are what lens, head and model say, of a passage and of one's own text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import residua
from residua.analysis.display.lens_maps import MEASURES, LensMaps
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cache.model.transformers_guard import guard_transformers
from residua.cache.store.activation_cache import ActivationCache

from ...support.models import save_model

STEPS: dict[str, Any] = {"steps": 4, "batch": 128, "lr": 0.1}


@pytest.fixture(scope="module")
def ridge(tiny_cache: ActivationCache) -> residua.RidgeProbe:
    return residua.RidgeProbe([0, 2]).fit(tiny_cache, keep=False)


@pytest.fixture(scope="module")
def lens(tiny_cache: ActivationCache) -> residua.TunedLens:
    return residua.TunedLens(layers=[1, 2], **STEPS).fit(tiny_cache)


def expected_cells(
    cache: ActivationCache, ridge: residua.RidgeProbe, layer: int, offset: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The cells of one layer in float64, by numpy."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    affine = ridge.map(layer, offset, None)
    hidden = affine.astype(np.float32)(cache.residual_array(layer)[rows])
    log_q = log_softmax(cache.head.logits(hidden).astype(np.float64))
    log_p = log_softmax(
        cache.head.logits(cache.residual_array(cache.n_blocks)[rows + offset]).astype(np.float64)
    )
    q, p = np.exp(log_q), np.exp(log_p)
    target = log_p.argmax(-1)
    return {
        "probability": q.max(-1),
        "entropy": -(q * log_q).sum(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "rank": 1.0 + (q > q[np.arange(len(q)), target][:, None]).sum(-1),
        "agrees": q.argmax(-1) == target,
    }


@pytest.mark.parametrize("offset", [0, 2])
def test_cells_of_a_passage_are_those_of_numpy(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe, offset: int
) -> None:
    sequence = int(tiny_cache.sequences("test")[0])
    passage = residua.CachePassage(tiny_cache, sequence=sequence, start=3, width=9)
    (entry,) = ridge.heatmap(passage, offsets=offset)
    first = int(tiny_cache.sequence_start[sequence]) + 3
    rows = np.arange(first, first + len(entry.tokens))
    assert 0 < len(rows) <= 9
    assert entry.layers == tiny_cache.layers
    for row, layer in enumerate(entry.layers):
        expected = expected_cells(tiny_cache, ridge, layer, offset, rows)
        for measure in MEASURES:
            np.testing.assert_allclose(
                entry.values[measure][row], expected[measure], rtol=1e-3, atol=1e-4
            )
        assert np.array_equal(entry.agrees[row], expected["agrees"])


def test_the_last_layer_agrees_with_itself(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    logit = residua.LogitLens.of(tiny_cache, [0])
    (entry,) = logit.heatmap(tiny_cache)
    assert entry.agrees[-1].all()
    assert entry.values["rank"][-1].tolist() == [1.0] * len(entry.tokens)
    np.testing.assert_allclose(entry.values["kl"][-1], 0.0, atol=1e-6)
    assert tuple(cell[0] for cell in entry.top[-1]) == entry.targets


def test_every_lens_is_given(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe, lens: residua.TunedLens
) -> None:
    lenses = {"a": ridge, "b": lens, "c": ridge, "d": lens, "e": ridge}
    maps = residua.read_lens_maps(lenses, tiny_cache, layers=[1, 2])
    assert [entry.lens for entry in maps] == list(lenses)
    assert {entry.layers for entry in maps} == {(1, 2)}
    evaluation = residua.evaluate(tiny_cache, lenses, offsets=0, max_positions=256)
    assert len(evaluation.heatmaps()) == 6  # and the logit lens


def test_offsets_have_a_map_each_and_end_with_the_document(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    maps = ridge.heatmap(tiny_cache, offsets=[2, 0], layers=1)
    assert [entry.offset for entry in maps] == [0, 2]
    assert maps[1].tokens == maps[0].tokens[: len(maps[1].tokens)]


def test_a_tracked_token_has_its_probability_and_rank(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    passage = residua.CachePassage(tiny_cache, sequence=0, width=5)
    by_id = ridge.heatmap(passage, track=7, layers=1)
    text = tiny_cache.tokenizer().decode([7], skip_special_tokens=False)
    by_text = ridge.heatmap(passage, track=text, layers=1)
    rows = int(tiny_cache.sequence_start[0]) + np.arange(len(by_id[0].tokens))
    hidden = ridge.map(1, 0).astype(np.float32)(tiny_cache.residual_array(1)[rows])
    logits = tiny_cache.head.logits(hidden).astype(np.float64)
    q = np.exp(logits - logits.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    for maps in (by_id, by_text):
        np.testing.assert_allclose(maps[0].values["probability"][0], q[:, 7], rtol=1e-3)
        rank = 1 + (q > q[:, 7:8]).sum(-1)
        assert maps[0].values["rank"][0].tolist() == rank.tolist()
        assert maps.tracked
    with pytest.raises(UsageError, match="is not one token of this model but"):
        ridge.heatmap(passage, track=text + " " + text)
    with pytest.raises(UsageError, match="track must be a token in 0-299, not 300"):
        ridge.heatmap(passage, track=300)


def test_a_token_with_a_space_is_tracked_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    """SentencePiece, of Llama and others, puts a space before each text: "cat" is " cat"."""
    folder = save_model(tmp_path / "model")
    words = ["<|endoftext|>", "\u2581", "\u2581the", "\u2581cat", "\u2581sat", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "s"))
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = space  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    lens = residua.LogitLens([1], [0])
    by_id = residua.read_lens_maps(lens, "the cat sat", model=folder, track=3, force=True)
    for text in (" cat", "cat"):
        by_text = residua.read_lens_maps(lens, "the cat sat", model=folder, track=text, force=True)
        assert by_text.tracked == by_id.tracked == "␣cat"
    with pytest.raises(UsageError, match="is not one token of this model"):
        residua.read_lens_maps(lens, "the cat", model=folder, track="  cat", force=True)


def test_the_difference_of_two_lenses(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe, lens: residua.TunedLens
) -> None:
    passage = residua.CachePassage(tiny_cache, sequence=0, width=6)
    a, b = ridge.heatmap(passage, measure="kl"), lens.heatmap(passage)
    difference = a - b
    (entry,) = difference
    assert entry.lens == "ridge - lens"
    assert entry.layers == (1, 2)
    np.testing.assert_array_equal(entry.values["kl"], a[0].values["kl"][1:3] - b[0].values["kl"])
    for row in range(2):
        for column in range(6):
            assert entry.top[row][column] == (
                a[0].top[row + 1][column][0],
                b[0].top[row][column][0],
            )
    assert not (a - a)[0].values["kl"].any()
    other = lens.heatmap(residua.CachePassage(tiny_cache, sequence=1, width=6))
    with pytest.raises(UsageError, match="read both of one passage"):
        _ = a - other
    with pytest.raises(UsageError, match="read both of one passage at one offset"):
        _ = a - ridge.heatmap(passage, offsets=2)


def test_own_text_is_read_by_the_model_of_the_cache(
    tiny_cache: ActivationCache, model_folder: Path, ridge: residua.RidgeProbe
) -> None:
    blocks = residua.load_model_of(tiny_cache)
    text = tiny_cache.tokenizer().decode(tiny_cache.tokens[1:20].tolist())
    maps = ridge.heatmap(text, model=blocks, cache=tiny_cache)
    by_folder = ridge.heatmap(text, model=model_folder)
    by_cache = ridge.heatmap(text, cache=tiny_cache)
    with guard_transformers():
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        loaded = auto.from_pretrained(model_folder)
    by_module = ridge.heatmap(text, model=loaded)
    for other in (by_folder, by_cache, by_module):
        assert other[0].tokens == maps[0].tokens
        np.testing.assert_allclose(
            other[0].values["kl"], maps[0].values["kl"], rtol=1e-3, atol=1e-5
        )
    assert maps.passage == "own text"


def test_own_text_has_the_residual_stream_of_the_model(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    """A document that begins a sequence of the cache has the same cells as its text."""
    start = int(tiny_cache.sequence_start[0])
    document = tiny_cache.document_numbers
    assert document is not None
    numbers = document[start : start + 64]
    length = int(np.flatnonzero(numbers != numbers[0])[0]) if (numbers != numbers[0]).any() else 64
    tokens = tiny_cache.tokens[start : start + length]
    text = tiny_cache.tokenizer().decode(tokens.tolist(), skip_special_tokens=True)
    own = ridge.heatmap(text, cache=tiny_cache)
    stored = ridge.heatmap(residua.CachePassage(tiny_cache, sequence=0, width=length))
    count = min(len(own[0].tokens), len(stored[0].tokens))
    assert count > 3
    assert own[0].tokens[:count] == stored[0].tokens[:count]
    np.testing.assert_allclose(
        own[0].values["kl"][:, :count], stored[0].values["kl"][:, :count], rtol=0.05, atol=5e-3
    )


def test_what_cannot_be_read_is_named(
    tiny_cache: ActivationCache, ridge: residua.RidgeProbe, lens: residua.TunedLens, tmp_path: Path
) -> None:
    def read(*args: Any, **options: Any) -> LensMaps:
        return residua.read_lens_maps(*args, **options)

    with pytest.raises(UsageError, match="there is no measure 'loss'"):
        read(ridge, tiny_cache, measure="loss")
    with pytest.raises(NotFoundError, match="ridge does not read layers 9 at offset 0"):
        read(ridge, tiny_cache, layers=9)
    with pytest.raises(NotFoundError, match="lens does not read any layer at offset 2"):
        read(lens, tiny_cache, offsets=2)
    with pytest.raises(NotFoundError, match="bigram reads no layer"):
        read(residua.Bigram([1]).fit(tiny_cache), tiny_cache)
    with pytest.raises(UsageError, match="give at least one lens"):
        read([], tiny_cache)
    with pytest.raises(UsageError, match=r"give model= \(folder, hub id or loaded model\)"):
        read(ridge, "some words")
    with pytest.raises(UsageError, match="the text is empty"):
        read(ridge, "  ", cache=tiny_cache)
    with pytest.raises(UsageError, match="the model reads 64 at once"):
        read(ridge, "words " * 200, cache=tiny_cache)
    with pytest.raises(UsageError, match="has no token with one 2 further"):
        read(ridge, "a", cache=tiny_cache, offsets=2)
    with pytest.raises(UsageError, match="a passage of a cache needs none"):
        read(ridge, tiny_cache, model="gpt2")
    with pytest.raises(UsageError, match="a passage cannot be a int"):
        read(ridge, 3)
    with pytest.raises(UsageError, match="sequence must lie in"):
        read(ridge, residua.CachePassage(tiny_cache, sequence=10**6))
    control = residua.ControlProbe(residua.RidgeProbe([0], layers=[1])).fit(tiny_cache)
    assert len(read(control, tiny_cache)) == 1
    with pytest.raises(UsageError, match="ridge/shuffled is a control"):
        read(control, "some words", cache=tiny_cache)
    other = save_model(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="fitted on a cache with head"):
        read(ridge, "some words here", model=other)
    assert len(read(ridge, "some words here", model=other, force=True)) == 1


def test_pictures_and_frames(
    tiny_cache: ActivationCache,
    ridge: residua.RidgeProbe,
    lens: residua.TunedLens,
    tmp_path: Path,
) -> None:
    passage = residua.CachePassage(tiny_cache, sequence=0, width=6)
    maps = residua.read_lens_maps([ridge, lens], passage)
    for shown in (
        maps,
        *(maps.with_measure(measure) for measure in MEASURES),
        ridge.heatmap(passage, track=7, measure="rank"),
        ridge.heatmap(passage, track=7),
        ridge.heatmap(passage, measure="kl") - lens.heatmap(passage),
    ):
        figure = shown.plot()
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert sum("N = 0" in title for title in titles) == len(shown)
        outlines = sum(len(axes.patches) for axes in figure.axes[: len(shown)])
        expected = sum(int((e.agrees != e.is_difference).sum()) for e in shown)
        assert outlines == expected
        figure.canvas.draw()
    assert maps.to_png(tmp_path / "a" / "maps.png").read_bytes()[:4] == b"\x89PNG"
    assert maps._repr_png_()[:4] == b"\x89PNG"
    frame = maps.to_dataframe()
    assert len(frame) == sum(entry.agrees.size for entry in maps)
    assert {"lens", "layer", "token", "kl", "agrees"} <= set(frame.columns)
    assert "LensMaps of ridge, lens at offsets 0: probability" in repr(maps)
