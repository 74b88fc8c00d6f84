"""Scores of the sample model: task accuracy, perplexity, and the trigram it is compared with."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .tasks import KINDS, Example, documents


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch: int = 32,
) -> list[np.ndarray]:
    """Return per example which answer tokens the model puts first, bool (answer tokens,)."""
    end_token = tokenizer.eos_token_id
    assert isinstance(end_token, int)
    rights: list[np.ndarray] = []
    for first in range(0, len(examples), batch):
        chunk = examples[first : first + batch]
        coded = tokenizer([e.text for e in chunk], return_offsets_mapping=True)
        longest = max(len(ids) for ids in coded["input_ids"])
        ids = torch.full((len(chunk), longest + 1), end_token)
        for row, line in zip(ids, coded["input_ids"], strict=True):
            row[1 : len(line) + 1] = torch.tensor(line)
        # row i of the guesses is about token i of the text, for <|endoftext|> stands before it
        guesses = model(input_ids=ids).logits.argmax(-1)
        for e, row, guess, offsets in zip(
            chunk, ids, guesses, coded["offset_mapping"], strict=True
        ):
            end = e.answer_start + len(e.answer)
            at = [i for i, (a, b) in enumerate(offsets) if a < end and b > e.answer_start]
            rights.append((guess[at] == row[1:][at]).numpy())
    return rights


def perplexity(model: PreTrainedModel, ids: np.ndarray, context: int = 256) -> float:
    """Return the perplexity of a token stream (tokens,) read in windows of ``context`` targets."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            row = torch.from_numpy(ids[start : start + context + 1].astype(np.int64))
            logits = model(input_ids=row[None, :-1]).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            count += len(row) - 1
    return float(np.exp(total / count))


def _counts(grams: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted codes of n-grams (n, order) and how often each occurs."""
    codes = np.zeros(len(grams), dtype=np.int64)
    for column in grams.T:
        codes = codes * vocab + column
    return np.unique(codes, return_counts=True)


def _look(codes: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted code, 0 where it is absent."""
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.where(codes[at] == wanted, values[at], 0)


def ngram_perplexity(train: np.ndarray, held: np.ndarray, vocab: int, order: int = 3) -> float:
    """Return the perplexity of an interpolated Kneser-Ney model on the tokens after the first."""
    train, held = train.astype(np.int64), held.astype(np.int64)
    chances = np.full(len(held) - 1, 1.0 / vocab)
    tables = {}
    for n in range(order, 0, -1):
        if n == order:
            grams = np.lib.stride_tricks.sliding_window_view(train, n)
            tables[n] = _counts(grams, vocab)
        else:  # lower orders count in how many different contexts a gram was seen
            tables[n] = np.unique(tables[n + 1][0] % vocab**n, return_counts=True)
    for n in range(1, order + 1):
        codes, counts = tables[n]
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.5
        contexts, first = np.unique(codes // vocab, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff([*first, len(codes)])
        # the first few targets lack a full history, so they keep the lower order's chance
        targets = np.arange(max(1, n - 1), len(held))
        history = np.zeros(len(targets), dtype=np.int64)
        for back in range(n - 1, 0, -1):
            history = history * vocab + held[targets - back]
        total = _look(contexts, totals, history)
        seen = np.maximum(_look(codes, counts, history * vocab + held[targets]) - discount, 0)
        rest = discount * _look(contexts, kinds, history)
        lower = chances[targets - 1]
        mixed = (seen + rest * lower) / np.maximum(total, 1)
        chances[targets - 1] = np.where(total > 0, mixed, lower)
    return float(np.exp(-np.log(chances).mean()))


def _means(pairs: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Return the mean of each group, in the order of the groups' names."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for key, right in pairs:
        groups[key].append(bool(right))
    return {key: round(float(np.mean(groups[key])), 3) for key in sorted(groups)}


def _band(value: int, lasts: Sequence[int], first: int) -> str:
    """Return the name of the band a value falls in, given the last value of each band."""
    for last in lasts:
        if value <= last:
            return f"{first:02d}-{last:02d}"
        first = last + 1
    return f"{first:02d}-"


def task_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each kind's accuracy over ``n`` examples, whole and by what makes it hard."""
    figures: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        examples = list(documents(kind, n, seed))
        rights = answers(model, tokenizer, examples)
        scored = [(e.meta, bool(r.all())) for e, r in zip(examples, rights, strict=True)]
        figures[kind] = {"accuracy": round(float(np.mean([right for _, right in scored])), 3)}
        if kind == "names":
            tokens = [
                (f"{i + 1:02d}", bool(right)) for r in rights for i, right in enumerate(r[:8])
            ]
            figures[kind]["by_token"] = _means(tokens)
        elif kind == "key_value":
            thirds = ("1 first third", "2 middle third", "3 last third")
            figures[kind]["by_position"] = _means(
                (thirds[3 * m["position"] // m["pairs"]], right) for m, right in scored
            )
            figures[kind]["by_pairs"] = _means(
                (_band(m["pairs"], (6, 9, 12, 16), 4), right) for m, right in scored
            )
            figures[kind]["by_layout"] = _means((str(m["layout"]), right) for m, right in scored)
        else:
            figures[kind]["by_shots"] = _means(
                (_band(m["shots"], (3, 6, 9, 12), 1), right) for m, right in scored
            )
            figures[kind]["by_rule"] = _means((m["rule"], right) for m, right in scored)
    return figures


def figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    held: np.ndarray,
    n: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Return the scores on held-out library tokens and on ``n`` fresh documents of each task."""
    vocab = model.config.vocab_size
    text = {
        "model_perplexity": round(perplexity(model, held), 2),
        "trigram_perplexity": round(ngram_perplexity(stream, held, vocab), 2),
        "unigram_perplexity": round(ngram_perplexity(stream, held, vocab, 1), 2),
        "train_tokens": len(stream),
        "held_out_tokens": len(held),
    }
    return {"text": text, "tasks": task_figures(model, tokenizer, n, seed=20_000)}
