"""Multi-document questions (Liu et al., 2307.03172) as texts for the study of essential layers.

From a file of questions with the passage that answers each, such as nq-open-oracle.jsonl.gz: every
question stands once at each position among passages of other questions, which do not contain any of
its answers. Such random distractors are easier to tell apart than retrieved ones.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....cache.errors import DataError, UsageError
from ....cache.files.json_files import write_atomically

PROMPT = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n{documents}\n\nQuestion: {question}\nAnswer: {answer}"
)
DOCUMENT = "Document [{number}](Title: {title}) {text}"
MAX_LINE = 1 << 20
"""Longest line of the file, in bytes."""
MAX_QUESTIONS = 200_000
"""Most questions that are read."""
MAX_TRIES = 100
"""Draws of one distractor before a question is left out."""


@dataclass(frozen=True)
class GoldQuestion:
    """A question, its answers, and the passage that has one of them."""

    question: str
    answers: tuple[str, ...]
    title: str
    text: str

    @property
    def answer(self) -> str:
        """The first of the answers that the passage has."""
        return next(answer for answer in self.answers if answer in self.text)

    def is_answered_by(self, text: str) -> bool:
        """Whether `text` contains one of the answers, in any case."""
        lower = text.lower()
        return any(answer.lower() in lower for answer in self.answers)


def read_gold_questions(path: Path, most: int = MAX_QUESTIONS) -> list[GoldQuestion]:
    """Questions of a .jsonl or .jsonl.gz file, those whose passage has an answer as it is written.

    A line has `question`, `answers` and `ctxs`, of which one has `isgold`, `title` and `text`.
    Raises `DataError` for another file.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    found: list[GoldQuestion] = []
    try:
        with opened(path, "rb") as file:
            number = 0
            while len(found) < most and (line := file.readline(MAX_LINE + 1)):
                number += 1
                question = _parse_question(line, path, number)
                if any(answer in question.text for answer in question.answers):
                    found.append(question)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not found:
        raise DataError(f"{path} has no question whose passage contains an answer")
    return found


def _parse_question(line: bytes, path: Path, number: int) -> GoldQuestion:
    """The question of one line; raises `DataError` naming the line."""
    where = f"{path}, line {number}"
    if len(line) > MAX_LINE:
        raise DataError(f"{where} has more than {MAX_LINE:,} bytes")
    try:
        row = json.loads(line)
        gold = next(passage for passage in row["ctxs"] if passage.get("isgold"))
        answers = tuple(str(answer) for answer in row["answers"] if str(answer).strip())
        return GoldQuestion(str(row["question"]), answers, str(gold["title"]), str(gold["text"]))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        raise DataError(
            f'{where} is no question with its passage: expected {{"question": ..., "answers": '
            '[...], "ctxs": [{"title": ..., "text": ..., "isgold": true}]}'
        ) from None


def multi_document_rows(
    source: Sequence[GoldQuestion], documents: Sequence[int], questions: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of texts: each of `questions` at every position among `documents` passages.

    A row has the columns `text`, `answer` (which the text ends with), `documents`, `gold` (the
    position of the passage with the answer, from 0) and `question`. Raises `UsageError` for counts
    that cannot be.
    """
    if questions < 1 or not documents or min(documents) < 1:
        raise UsageError("documents and questions are 1 or more")
    if max(documents) > len(source):
        raise UsageError(
            f"{max(documents)} documents need as many questions; there are {len(source)}"
        )
    order = random.Random(seed).sample(range(len(source)), len(source))
    for count in documents:
        made = 0
        for index in order:
            if made == questions:
                break
            asked = source[index]
            others = _draw_distractors(source, index, count - 1, f"{seed} {count} {index}")
            if others is None:
                continue
            made += 1
            for gold in range(count):
                listed = [*others[:gold], asked, *others[gold:]]
                shown = "\n".join(
                    DOCUMENT.format(number=place + 1, title=passage.title, text=passage.text)
                    for place, passage in enumerate(listed)
                )
                yield {
                    "text": PROMPT.format(
                        documents=shown, question=asked.question, answer=asked.answer
                    ),
                    "answer": asked.answer,
                    "documents": count,
                    "gold": gold,
                    "question": f"{count}-{index}",
                }


def _draw_distractors(
    source: Sequence[GoldQuestion], index: int, count: int, seed: str
) -> list[GoldQuestion] | None:
    """Passages of other questions without an answer of question `index`; None if none are found."""
    rng, asked, drawn = random.Random(seed), source[index], dict[int, None]()
    for _ in range(count):
        for _ in range(MAX_TRIES):
            other = rng.randrange(len(source))
            passage = source[other]
            is_other = other != index and other not in drawn and passage.text != asked.text
            if is_other and not asked.is_answered_by(f"{passage.title} {passage.text}"):
                drawn[other] = None
                break
        else:
            return None
    return [source[other] for other in drawn]


def write_multi_document_data(
    gold: Path, out: Path, documents: Sequence[int], questions: int, seed: int = 0
) -> dict[str, Any]:
    """Write the rows as .jsonl; returns the number of texts and the longest in characters."""
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} is written as JSON lines: name it {out.with_suffix('.jsonl')}")
    lines, longest = [], 0
    for row in multi_document_rows(read_gold_questions(gold), documents, questions, seed):
        lines.append(json.dumps(row) + "\n")
        longest = max(longest, len(row["text"]))
    write_atomically(out, "".join(lines).encode())
    return {"path": str(out), "texts": len(lines), "longest": longest}
