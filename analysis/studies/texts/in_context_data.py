"""Texts whose continuation follows from their own context after k shots, for `study icl`.

    induction    a random list of words, said k times among others, whose first word comes again
    map          k lines `a -> b` of one hidden rule, with outputs of two words
    arithmetic   k lines `a ? b = c` of one hidden operation, sum or difference
    period       a random list of p words, said k times without a break

A text ends with an answer, the continuation after k shots. Where the answer goes on beyond what the
context determines (induction and arithmetic), the rest is drawn at random: nobody can foresee it.
Labels: `kind`, `shots` (k), `needed` (shots that determine the answer), `known_until` (character at
which the determined part of the answer ends) or `horizon` (its tokens), `period`, `rule`.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....cache.errors import UsageError
from ....cache.files.json_files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = (
    "apple arm ball band bank basket bean bear bell bird boat book bottle bowl bread bridge brush "
    "button cake camel candle card cat cave chain chair cheese circle clock cloud coat coin corn "
    "cup deer desk dish dog door dragon dress drum duck ear egg farm feather field finger flag "
    "floor flower forest fox frog garden gate glass goat gold grape hammer hand hat hill horse "
    "house island jacket king kite knife lake lamp leaf letter lion market mirror moon mouse nest "
    "orange paper pearl pencil piano pipe plate pocket queen rabbit radio ring river road rock "
    "roof rose salt ship shirt shoe silver snake spoon star stone street sugar table tiger tower "
    "train tree valley village wagon wall water wheel window winter wolf"
).split()
KINDS = ("induction", "map", "arithmetic", "period")
TOKEN_KINDS = ("induction", "period")
"""Kinds that can be written as token ids."""
RULES: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "swap": lambda a, b: (f"{a} {b}", f"{b} {a}"),
    "repeat": lambda a, b: (a, f"{a} {a}"),
    "keep": lambda a, b: (f"{a} {b}", f"{a} {b}"),
}
"""Rule of a map -> input and output made of two words; `dictionary` gives each input its own."""
SEGMENT = 6
"""Words of the list of an induction."""
BEYOND = 3
"""Words of an answer after its determined part."""
MOST_SHOTS = 64


@dataclass(frozen=True)
class Continuation:
    """A text in pieces: context, the determined part of the answer, and what follows at random."""

    context: str
    determined: str
    beyond: str
    needed: int
    """Shots from which the determined part follows from the context."""
    labels: dict[str, Any]


def in_context_rows(
    kinds: Sequence[str] = KINDS,
    shots: Sequence[int] = tuple(range(9)),
    documents: int = 50,
    periods: Sequence[int] = (3, 5),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of texts: `documents` for each kind and number of shots.

    A row has the columns `text`, `answer`, `answer_start` and the labels of the module. Raises
    `UsageError` for kinds and counts that cannot be.
    """
    _check_counts(kinds, shots, documents, periods)
    for kind in kinds:
        for count in shots:
            for number in range(documents):
                # Of the seed, the kind and both numbers: more documents change no earlier one.
                rng = random.Random(f"{seed} {kind} {count} {number}")
                made = _make_continuation(kind, count, rng, periods[number % len(periods)])
                start = len(made.context)
                answer = made.determined + made.beyond
                yield {
                    "text": made.context + answer + "\n",
                    "answer": answer,
                    "answer_start": start,
                    "kind": kind,
                    "shots": count,
                    "needed": made.needed,
                    "known_until": start + len(made.determined),
                    **made.labels,
                }


def in_context_token_rows(
    ids: Sequence[int],
    kinds: Sequence[str] = TOKEN_KINDS,
    shots: Sequence[int] = tuple(range(9)),
    documents: int = 50,
    periods: Sequence[int] = (3, 5),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of token ids for `extract --positions explicit`, words being random tokens of `ids`.

    A row has the columns `input_ids`, `positions` (those that predict the answer, counted from the
    end) and the labels of the module, `horizon` among them. Raises `UsageError` for other kinds.
    """
    _check_counts(kinds, shots, documents, periods)
    if not set(kinds) <= set(TOKEN_KINDS):
        raise UsageError(
            f"token ids are written for the kinds {' and '.join(TOKEN_KINDS)}; others need words: "
            "leave --model out"
        )
    for kind in kinds:
        for count in shots:
            for number in range(documents):
                rng = random.Random(f"{seed} {kind} {count} {number}")
                period = periods[number % len(periods)]
                context, determined, beyond = _repetition(kind, count, rng, period, ids)
                length = len(determined) + len(beyond)
                yield {
                    "input_ids": [*context, *determined, *beyond],
                    "positions": list(range(-length - 1, -1)),
                    "kind": kind,
                    "shots": count,
                    "needed": 1,
                    "horizon": len(determined),
                    "period": period if kind == "period" else 0,
                }


def _check_counts(
    kinds: Sequence[str], shots: Sequence[int], documents: int, periods: Sequence[int]
) -> None:
    """Raise `UsageError` for kinds and counts that cannot be."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"kinds are {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    if not shots or min(shots) < 0 or max(shots) > MOST_SHOTS or documents < 1:
        raise UsageError(f"shots are 0 to {MOST_SHOTS}, and documents 1 or more")
    if not periods or min(periods) < 2 or max(periods) > len(WORDS):
        raise UsageError(f"periods are 2 to {len(WORDS)}")


def _repetition(
    kind: str, shots: int, rng: random.Random, period: int, items: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Context, determined part and rest of an induction or a period, of words or token ids."""
    if kind == "period":
        repeated = rng.sample(items, period)
        # Without a shot, something stands before the first word.
        return [rng.choice(items), *repeated * shots], repeated, []
    segment = rng.sample(items, SEGMENT)
    others = [item for item in items if item not in set(segment)]
    context: list[Any] = []
    for _ in range(shots):
        context += [*rng.sample(others, rng.randint(2, 4)), *segment]
    context += [*rng.sample(others, rng.randint(2, 4)), segment[0]]
    return context, segment[1:], rng.sample(others, BEYOND)


def _make_continuation(kind: str, shots: int, rng: random.Random, period: int) -> Continuation:
    """One text of words."""
    if kind in TOKEN_KINDS:
        context, determined, beyond = _repetition(kind, shots, rng, period, WORDS)
        rest = " " + " ".join(beyond) if beyond else ""
        labels = {"period": period if kind == "period" else 0, "rule": kind}
        return Continuation(" ".join(context) + " ", " ".join(determined), rest, 1, labels)
    if kind == "map":
        return _make_map(shots, rng)
    return _make_equations(shots, rng)


def _make_map(shots: int, rng: random.Random) -> Continuation:
    """Lines `a -> b`; with the rule `dictionary` the asked input stands among the shots."""
    rule = rng.choice([*RULES, "dictionary"])
    if rule == "dictionary":
        words = rng.sample(WORDS, 3 * (shots + 1)) if 3 * (shots + 1) <= len(WORDS) else None
        if words is None:
            raise UsageError(f"maps have at most {len(WORDS) // 3 - 1} shots")
        pairs = [(a, f"{b} {c}") for a, b, c in zip(*[iter(words)] * 3, strict=True)]
        asked = rng.choice(pairs[:shots]) if shots else pairs[0]
        pairs = [*pairs[:shots], asked]
    else:
        pairs = [RULES[rule](*rng.sample(WORDS, 2)) for _ in range(shots + 1)]
    lines = "".join(f"{source} -> {output}\n" for source, output in pairs[:-1])
    source, output = pairs[-1]
    return Continuation(f"{lines}{source} -> ", output, "", 1, {"period": 0, "rule": rule})


def _make_equations(shots: int, rng: random.Random) -> Continuation:
    """Lines `a ? b = c`; the answer is c and the first number of a next line, which is random.

    The line break after c is no part of the determined one: it follows from no shot.
    """
    rule = rng.choice(("sum", "difference"))

    def equation() -> tuple[int, int, int]:
        b = rng.randint(10, 49)
        a = rng.randint(b + 1, 99)
        return a, b, a + b if rule == "sum" else a - b

    lines = "".join(f"{a} ? {b} = {c}\n" for a, b, c in (equation() for _ in range(shots)))
    a, b, c = equation()
    labels = {"period": 0, "rule": rule}
    return Continuation(f"{lines}{a} ? {b} = ", str(c), f"\n{equation()[0]}", 1, labels)


def ordinary_token_ids(tokenizer: "Tokenizer") -> list[int]:
    """Ids of the tokens of `tokenizer` that are no special or added ones, ascending."""
    added = set(tokenizer.get_added_tokens_decoder())
    return [token for token in range(tokenizer.get_vocab_size()) if token not in added]


def write_in_context_data(
    path: Path,
    kinds: Sequence[str] | None = None,
    shots: Sequence[int] = tuple(range(9)),
    documents: int = 50,
    periods: Sequence[int] = (3, 5),
    seed: int = 0,
    model: Path | None = None,
) -> dict[str, Any]:
    """Write the rows as .jsonl, as token ids of the tokenizer in the folder `model` if given.

    Returns the number of texts and the longest, in characters or tokens.
    """
    if path.suffix != ".jsonl":
        raise UsageError(f"{path} is written as JSON lines: name it {path.with_suffix('.jsonl')}")
    if model is None:
        rows = list(in_context_rows(kinds or KINDS, shots, documents, periods, seed))
        longest = max(len(row["text"]) for row in rows)
    else:
        from ....cache.model.tokenizer import load_tokenizer

        ids = ordinary_token_ids(load_tokenizer(model))
        rows = list(
            in_context_token_rows(ids, kinds or TOKEN_KINDS, shots, documents, periods, seed)
        )
        longest = max(len(row["input_ids"]) for row in rows)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {
        "path": str(path),
        "texts": len(rows),
        "longest": longest,
        "unit": "characters" if model is None else "tokens",
    }
