"""The sample model: its generators, its tokenizer, its file, and how well it does its tasks."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from residua.sample import MODEL_DIR, TEXT_PATH
from residua.sample.evaluate import answers, ngram_perplexity, perplexity, task_figures
from residua.sample.heldout import build
from residua.sample.tasks import KINDS, NAMES, documents

# a little below what sample/figures.json measures on 1000 examples of each kind
LEAST = {"names": 0.93, "key_value": 0.9, "maps": 0.75}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def held_out():
    lines = TEXT_PATH.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_generators_repeat_and_locate_the_answer(kind):
    first, again = list(documents(kind, 50, 3)), list(documents(kind, 50, 3))
    assert first == again != list(documents(kind, 50, 4))
    for e in first:
        assert e.answer
        assert e.text[e.answer_start : e.answer_start + len(e.answer)] == e.answer


def test_key_value_asks_for_any_position():
    metas = [e.meta for e in documents("key_value", 600, 5)]
    thirds = np.bincount([3 * m["position"] // m["pairs"] for m in metas])
    assert len(thirds) == 3
    assert thirds.min() > 120
    assert {m["pairs"] for m in metas} == set(range(4, 17))


def test_key_value_answer_is_the_value_of_the_asked_pair():
    for e in documents("key_value", 50, 6):
        assert e.text[: e.answer_start].count(e.answer) >= 1


def test_dictionary_maps_show_the_asked_input_before():
    for e in documents("maps", 100, 7):
        if e.meta["rule"] == "dictionary":
            lines = e.text.splitlines()
            assert lines[e.meta["position"]] == lines[-1]
            assert len(lines) == e.meta["shots"] + 1


def test_names_are_many_tokens(tokenizer):
    words = {word for name in NAMES for word in name}
    assert min(len(tokenizer.tokenize(" " + word)) for word in words) >= 2


def test_tokenizer_round_trip_and_both_classes_agree(tokenizer, held_out):
    plain = PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)
    texts = [d["text"] for d in held_out[:30]] + ["  naïve café — 日本 🙂\n\tx =  1", ""]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == plain(text).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0


def test_the_file_is_small_and_loads_as_float32(model):
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(input_ids=torch.arange(512)[None]).logits
    assert logits.shape == (1, 512, model.config.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_on_each_task(model, tokenizer, kind):
    rights = answers(model, tokenizer, list(documents(kind, 40, 99)))
    assert np.mean([right.all() for right in rights]) >= LEAST[kind]


def test_task_figures_group_every_kind(model, tokenizer):
    figures = task_figures(model, tokenizer, 12, seed=1)
    assert set(figures) == set(KINDS)
    assert set(figures["key_value"]["by_position"]) <= {
        "1 first third",
        "2 middle third",
        "3 last third",
    }


def test_perplexity_is_far_below_unigram(model, tokenizer, held_out):
    def stream(some):
        return np.concatenate([[0, *tokenizer(d["text"]).input_ids] for d in some])

    page = [d for d in held_out if d["kind"] in ("page", "source", "prose")]
    few, rest = stream(page[:6]), stream(page[6:])
    unigram = ngram_perplexity(rest, few, model.config.vocab_size, order=1)
    assert perplexity(model, few) < unigram / 2


def test_trigram_learns_a_cycle():
    cycle = np.tile(np.arange(5), 200)
    assert ngram_perplexity(cycle, cycle[:100], vocab=5) < 1.1
    noise = np.random.default_rng(0).integers(0, 5, 4000)
    assert 4.5 < ngram_perplexity(noise, noise[::-1], vocab=5) < 5.6


def test_heldout_documents_are_deterministic_and_bounded(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One\n\n" + "words and more words\n" * 60 + "\n## Two\n\nend\n"
    )
    (tmp_path / "b.py").write_text('"""Doc."""\n\n\ndef f():\n    return 1\n' * 30)
    first = build(tmp_path, 20_000)
    assert first == build(tmp_path, 20_000)
    assert {d["kind"] for d in first} == {"page", "source", *KINDS}
    assert max(len(d["text"]) for d in first) <= 3001


def test_heldout_file_has_all_kinds(held_out):
    kinds = {d["kind"] for d in held_out}
    assert {"source", "page", "prose", *KINDS} <= kinds
    assert 300_000 < TEXT_PATH.stat().st_size < 500_000
