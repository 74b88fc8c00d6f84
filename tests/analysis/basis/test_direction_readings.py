"""Claims about readings of directions: each number equals a plain computation, texts are safe."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

import residua
from residua.analysis.basis.direction_readings import read_directions
from residua.analysis.basis.layer_persistence import span_overlap
from residua.cache.errors import MismatchError, NotFoundError, ResiduaWarning, UsageError
from residua.cache.head.head import Head
from residua.cache.head.program import Program
from residua.cache.head.program_head import ProgramHead
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.tokens.segments import context_indices, document_of
from residua.probes.basis.layer_basis import LayerBasis
from residua.probes.ridge.solver import AffineMap

from ...support.models import texts
from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB = 8, 31
LENGTHS = (40, 25, 35, 30, 20, 45)


def states_of(layers: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (sum(LENGTHS), WIDTH)
    return [rng.normal(1, 2, shape).astype(np.float32) for _ in range(layers)]


def random_basis(seed: int, k: int = 3) -> LayerBasis:
    """An oblique basis: encoder decoder' is the identity."""
    rng = np.random.default_rng(seed)
    encoder = rng.normal(0, 1, (k, WIDTH))
    return LayerBasis(encoder, np.linalg.pinv(encoder).T, rng.normal(0, 1, WIDTH))


def random_map(seed: int) -> AffineMap:
    rng = np.random.default_rng(seed)
    return AffineMap(rng.normal(0, 0.5, (WIDTH, WIDTH)), rng.normal(0, 0.5, WIDTH))


def metrics_for(bases: Mapping[int, LayerBasis]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "energies": [layer + 0.5 * i for i in range(basis.k)],
            "influences": [layer + 0.25 * i for i in range(basis.k)],
        }
        for layer, basis in bases.items()
    ]


@pytest.fixture(scope="module")
def states() -> list[np.ndarray]:
    return states_of(3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, states) -> ActivationCache:
    # Documents of 13 tokens, across the borders of sequences too.
    documents = np.arange(sum(LENGTHS)) // 13
    folder = tmp_path_factory.mktemp("caches")
    return make_cache(folder, states, LENGTHS, random_head(WIDTH, VOCAB), documents=documents)


def read_all(cache: ActivationCache, bases: dict[int, LayerBasis], **options: Any) -> Any:
    maps = {layer: random_map(layer) for layer in bases}
    options = {"split": "all", "rows_of_metrics": metrics_for(bases), **options}
    return read_directions(cache, bases, maps, **options)


def log_probabilities(head: Head, rows: np.ndarray) -> np.ndarray:
    """Layer norm, unembedding and softmax in float64."""
    centred = rows - rows.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + head.eps)
    logits = (normed * head.norm_weight + head.norm_bias) @ head.unembedding.T.astype(float)
    logits += head.bias
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_changes_of_log_probabilities_equal_a_plain_computation(cache, states):
    basis, affine = random_basis(1), random_map(1)
    reading = read_all(cache, {1: basis}, n_tokens=VOCAB)[1]
    rows = states[1].astype(float)
    assert reading.n == reading.n_token_rows == len(rows) <= 256
    deviations = ((rows - basis.reference) @ basis.encoder.T.astype(float)).std(0)
    for i, direction in enumerate(reading.directions):
        assert direction.deviation == pytest.approx(deviations[i], rel=1e-6)
        step = deviations[i] * basis.decoder[i].astype(float)
        above, below = (
            log_probabilities(cache.head, (rows + sign * step) @ affine.weight + affine.bias)
            for sign in (1, -1)
        )
        changes = (above - below).mean(0)
        # Every token with a change is at one end, in the order of a plain sort.
        order = np.argsort(-changes)
        promoted = [token for token in order if changes[token] > 0]
        suppressed = [token for token in order[::-1] if changes[token] < 0]
        assert [entry.token for entry in direction.promoted] == promoted
        assert [entry.token for entry in direction.suppressed] == suppressed
        for entry in (*direction.promoted, *direction.suppressed):
            assert entry.change == pytest.approx(changes[entry.token], abs=2e-5)
            assert entry.label == f"#{entry.token}"


def test_the_difference_of_two_unembeddings_promotes_one_token_and_suppresses_the_other(tmp_path):
    rng = np.random.default_rng(0)
    unembedding = np.linalg.qr(rng.normal(0, 1, (WIDTH, WIDTH)))[0].astype(np.float32)
    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    head = Head("none", 0.0, ones, zeros, unembedding, zeros)
    cache = make_cache(tmp_path, states_of(2), LENGTHS, head)
    difference = (unembedding[5] - unembedding[2])[None]
    basis = LayerBasis(difference / 2, difference, np.zeros(WIDTH))
    identity = AffineMap(np.eye(WIDTH), np.zeros(WIDTH))
    metrics = metrics_for({0: basis})
    reading = read_directions(
        cache, {0: basis}, {0: identity}, rows_of_metrics=metrics, split="all"
    )
    (direction,) = reading[0].directions
    assert direction.promoted[0].token == 5
    assert direction.suppressed[0].token == 2
    # The logit difference of the two tokens moves by 2 s (|w5|^2 + |w2|^2 - 2 w5 w2).
    moved = direction.promoted[0].change - direction.suppressed[0].change
    assert moved == pytest.approx(4 * direction.deviation, rel=1e-5)


def test_a_head_of_operations_is_read_like_any_other(tmp_path):
    rng = np.random.default_rng(3)
    tensors = {"w": rng.normal(0, 0.5, (WIDTH, VOCAB)).astype(np.float32)}
    nodes = [{"op": "mm", "args": {"self": {"node": 0}, "mat2": {"tensor": "w"}}}]
    program = Program.from_json(nodes, set(tensors))
    head = ProgramHead(program, tensors, WIDTH, VOCAB)
    cache = make_cache(tmp_path, states_of(2), LENGTHS, head)
    basis, affine = random_basis(2, 1), random_map(0)
    reading = read_all(cache, {0: basis}, n_tokens=VOCAB)[0]
    rows = states_of(2)[0].astype(float)
    step = rows @ basis.encoder[0].astype(float)
    step = step.std() * basis.decoder[0].astype(float)
    ends = []
    for sign in (1, -1):
        logits = ((rows + sign * step) @ affine.weight + affine.bias) @ tensors["w"].astype(float)
        ends.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    changes = (ends[0] - ends[1]).mean(0)
    for entry in reading.directions[0].promoted:
        assert entry.change == pytest.approx(changes[entry.token], abs=2e-5)


def test_passages_are_the_extremes_of_a_plain_sort(cache, states):
    basis = random_basis(1)
    reading = read_all(cache, {1: basis}, n_passages=4)[1]
    coordinates = (states[1].astype(float) - basis.reference) @ basis.encoder.T.astype(float)
    coordinates /= coordinates.std(0)
    documents = np.arange(len(coordinates)) // 13
    for i, direction in enumerate(reading.directions):
        for passages, order in (
            (direction.highest, np.argsort(-coordinates[:, i])),
            (direction.lowest, np.argsort(coordinates[:, i])),
        ):
            best: dict[int, int] = {}
            for position in order.tolist():
                best.setdefault(int(documents[position]), position)
            assert [passage.position for passage in passages] == list(best.values())[:4]
            assert [passage.document for passage in passages] == list(best)[:4]
            for passage in passages:
                value = coordinates[passage.position, i]
                assert passage.coordinate == pytest.approx(value, rel=1e-6)


def test_one_document_gives_a_passage_per_sequence(tmp_path, states):
    documents = np.zeros(sum(LENGTHS), int)
    cache = make_cache(tmp_path, states, LENGTHS, random_head(WIDTH, VOCAB), documents=documents)
    (direction, *_) = read_all(cache, {1: random_basis(1)}, n_passages=20)[1].directions
    sequences = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    chosen = [int(sequences[passage.position]) for passage in direction.highest]
    assert sorted(chosen) == list(range(len(LENGTHS)))


def test_matches_and_overlaps_equal_numpys_correlations(cache, states):
    bases = {0: random_basis(10, 2), 2: random_basis(12, 3)}
    readings = read_all(cache, bases)
    assert readings[0].overlap is readings[0].previous_layer is None
    assert all(direction.match is None for direction in readings[0].directions)
    assert readings[2].previous_layer == 0
    earlier, later = (
        (states[la].astype(float) - basis.reference) @ basis.encoder.T.astype(float)
        for la, basis in bases.items()
    )
    correlations = np.corrcoef(earlier.T, later.T)[:2, 2:]
    for i, direction in enumerate(readings[2].directions):
        match = direction.match
        assert match.layer == 0
        assert match.direction == np.abs(correlations[:, i]).argmax()
        assert match.correlation == pytest.approx(correlations[match.direction, i], abs=1e-9)
        first, second = bases[0].decoder[match.direction], bases[2].decoder[i]
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert match.cosine == pytest.approx(cosine, abs=1e-6)
    # Squared canonical correlations by the normal equations, not by orthonormal bases.
    x, y = earlier - earlier.mean(0), later - later.mean(0)
    product = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    assert readings[2].overlap == pytest.approx(np.trace(product) / 2, abs=1e-9)
    assert 0 < readings[2].chance_overlap < 0.1


def test_equal_rows_with_equal_bases_overlap_entirely(tmp_path):
    (state,) = states_of(1)
    cache = make_cache(tmp_path, [state, state], LENGTHS, random_head(WIDTH, VOCAB))
    basis = random_basis(4)
    reading = read_all(cache, {0: basis, 1: basis})[1]
    assert reading.overlap == pytest.approx(1, abs=1e-12)
    for direction in reading.directions:
        assert direction.match.direction == direction.direction
        assert direction.match.correlation == pytest.approx(1, abs=1e-12)
        assert direction.match.cosine == pytest.approx(1, abs=1e-12)
    # Of 8 dimensions, any 3 directions share some with these 3.
    assert 0.1 < reading.chance_overlap < 0.8


def test_an_overlap_counts_the_directions_that_vary():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (500, 3)) * (1e-6, 1.0, 1e6) + 5
    mixed = values @ rng.normal(0, 1, (3, 3))
    assert span_overlap(values, values[:, :1]) == pytest.approx(1)
    assert span_overlap(values, mixed) == pytest.approx(1)
    assert span_overlap(values, np.full((500, 2), 0.1)) is None
    assert (span_overlap(values, rng.normal(0, 1, (500, 3))) or 1) < 0.03


def test_metrics_are_repeated_per_direction_and_all_is_json(cache):
    bases = {2: random_basis(0), 1: random_basis(1)}
    steps: list[tuple[int, int]] = []
    readings = read_all(cache, bases, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    assert list(readings) == [1, 2]
    assert [d.energy for d in readings[2].directions] == [2.0, 2.5, 3.0]
    assert [d.influence for d in readings[1].directions] == [1.0, 1.25, 1.5]
    told = json.loads(json.dumps(readings[2].to_dict(), allow_nan=False))
    assert told["directions"][1]["match"]["layer"] == 1
    again = read_all(cache, bases)
    assert again == readings


def test_constant_coordinates_have_no_tokens_passages_and_matches(tmp_path, states):
    rows = states[0].copy()
    rows[:, 0] = 3.0
    cache = make_cache(tmp_path, [states[1], rows], LENGTHS, random_head(WIDTH, VOCAB))
    constant = LayerBasis(np.eye(WIDTH)[:2], np.eye(WIDTH)[:2], np.zeros(WIDTH))
    reading = read_all(cache, {0: random_basis(0), 1: constant})[1]
    first, second = reading.directions
    assert first.deviation == 0
    assert first.match is None
    assert first.promoted == first.suppressed == first.highest == first.lowest == ()
    assert second.match is not None
    assert second.highest


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": {}}, UsageError, "layer 1 has a basis but no map"),
        ({"rows": []}, UsageError, "layer 1 has a basis but no row of metrics"),
        ({"rows": [{"layer": 1}]}, UsageError, "need 3 energies"),
        ({"bases": {7: random_basis(0)}}, NotFoundError, "layer 7 is not in this cache"),
        ({"maps": {1: AffineMap(np.eye(4), np.zeros(4))}}, MismatchError, "weight of the map"),
        ({"positions": 1}, UsageError, "two positions"),
        ({"n_tokens": -1}, UsageError, "n_tokens must be 0 or more"),
        ({"n_passages": 1.5}, UsageError, "n_passages must be a whole number"),
        ({"drop_first": 99}, UsageError, "the all split has no position"),
    ],
)
def test_a_mistake_has_one_clear_message(cache, change, error, message):
    bases = change.pop("bases", {1: random_basis(0)})
    maps = change.pop("maps", {layer: random_map(layer) for layer in bases})
    rows = change.pop("rows", metrics_for(bases))
    with pytest.raises(error, match=re.escape(message)):
        read_directions(cache, bases, maps, rows_of_metrics=rows, split="all", **change)


HOSTILE = "<b>cat</b> Étienne 東京 \U0001f600 the\x07bell\nand ␣ \\ dog </script> &amp; ran"


@pytest.fixture(scope="module", params=["packed", "some positions"])
def text_cache(request, tmp_path_factory, model_folder: Path) -> ActivationCache:
    folder = tmp_path_factory.mktemp("texts")
    documents = [f"{n} {HOSTILE} {text}" for n, text in enumerate(texts(30))]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options: dict[str, Any] = {"pack": True} if request.param == "packed" else {"pack": False}
    if request.param != "packed":
        options["positions"] = "sample:3"
    return residua.extract(model_folder, file, root=folder, context=128, **options)


def printable_text(text: str) -> str:
    """The letters that a passage shows instead of backslash, box of a space, and controls."""
    text = text.replace("\\", "\\\\").replace("␣", "\\u2423")
    return text.replace("\x07", "\\x07").replace("\n", "\\n")


def test_passages_are_the_text_around_the_position_inside_its_document(text_cache):
    cache, rng = text_cache, np.random.default_rng(0)
    encoder = rng.normal(0, 1, (2, cache.d_model))
    basis = LayerBasis(encoder, encoder, np.zeros(cache.d_model))
    affine = AffineMap(np.eye(cache.d_model), np.zeros(cache.d_model))
    reading = read_directions(
        cache,
        {1: basis},
        {1: affine},
        rows_of_metrics=metrics_for({1: basis}),
        n_passages=30,
        split="all",
    )[1]
    documents = [f"{n} {HOSTILE} {text}" for n, text in enumerate(texts(30))]
    for passage in (*reading.directions[0].highest, *reading.directions[1].lowest):
        position = np.array([passage.position])
        assert passage.document == document_of(cache, position)[0]
        document, start, stop = cache.spans(position)[0]
        text = documents[document]
        whole = printable_text(text)
        # Characters of several tokens may be cut at the ends of a passage; marks are no text.
        before, after = (
            re.sub(r"^(\\<..>)+|(\\<..>)+$", "", part.replace("<|endoftext|>", ""))
            for part in (passage.before, passage.after)
        )
        assert before in whole
        assert after in whole
        assert printable_text(text[:start]).endswith(before) or "\\<" in passage.token
        assert printable_text(text[stop:]).startswith(after) or "\\<" in passage.token
        if "\\<" not in passage.token:
            token = printable_text(text[start:stop]).replace(" ", "␣")
            assert passage.token in (token, "<|endoftext|>")
        if start > 60 and context_indices(cache, position)[0] >= 12:
            assert len(passage.before) >= 12


def test_bytes_of_a_character_are_one_letter_of_a_passage(tmp_path):
    """A vocabulary of SentencePiece: spaces lead words, unknown letters are three bytes."""
    pieces = ["<unk>", "▁the", "▁cat", "<0xE6>", "<0x9D>", "<0xB1>", "<", "\n"]
    tokenizer = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [], byte_fallback=True))
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence(list(steps))  # pyright: ignore[reportAttributeAccessIssue]
    rows = states_of(1)[0][:8]
    rows[:, 0] = (0, 0, 0, 0, 0, 1, 0, 0)
    ids = np.array([1, 3, 4, 5, 6, 2, 7, 3])
    cache = make_cache(tmp_path, [rows], [8], random_head(WIDTH, VOCAB), ids=ids)
    tokenizer.save(str(cache.path / "head" / "tokenizer.json"))
    basis = LayerBasis(np.eye(WIDTH)[:1], np.eye(WIDTH)[:1], np.zeros(WIDTH))
    (passage,) = read_all(cache, {0: basis})[0].directions[0].highest
    assert (passage.before, passage.token, passage.after) == (" the東<", "␣cat", "\\n\\<E6>")
    # Tokens that the tokenizer does not know are ids.
    (direction,) = read_all(cache, {0: basis}, n_tokens=VOCAB)[0].directions
    labels = {entry.token: entry.label for entry in (*direction.promoted, *direction.suppressed)}
    assert all((label == f"#{token}") == (token > 7) for token, label in labels.items())


def test_a_tokenizer_that_cannot_be_read_gives_ids(tmp_path, states):
    cache = make_cache(tmp_path, states, LENGTHS, random_head(WIDTH, VOCAB))
    (cache.path / "head" / "tokenizer.json").write_text("{]")
    with pytest.warns(ResiduaWarning, match=r"tokenizer\.json cannot be read"):
        reading = read_all(cache, {1: random_basis(0)})[1]
    (passage, *_) = reading.directions[0].highest
    ids = cache.tokens[passage.position - 1 : passage.position + 1]
    assert passage.token == f"#{ids[1]}"
    assert passage.before.endswith(f"#{ids[0]}")
