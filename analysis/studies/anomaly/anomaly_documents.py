"""The documents of `study anomaly`: their arms, questions and the positions that are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.errors import NotFoundError, ResiduaError, UsageError
from ..trajectories.position_sample import PositionSample, choose_positions

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True)
class AnomalyLabels:
    """Names of labels of a cache, and the values that mean clean and benign."""

    arm: str = "arm"
    clean: str = "clean"
    benign: str | None = "benign"
    """Value of a control that is neither clean nor an anomaly; None without one."""
    question: str | None = "question"
    """Label of what texts have in common; without it every document is one of its own."""
    template: str | None = "template"
    """Label of the kind of an anomaly, for leaving one out."""
    answer: str = "answer"
    wanted: str = "wanted"
    """Label of the answer that an attacker wants."""


@dataclass(frozen=True, eq=False)
class AnomalyDocuments:
    """Documents with an arm, and `last` positions of each; arrays are `(documents,)`."""

    sample: PositionSample
    """`last` positions of every document, document by document."""
    last: int
    sequences: np.ndarray
    """A sequence of each document, for its labels."""
    arm: np.ndarray
    """Value of the label of the arm, as text."""
    question: np.ndarray
    """Number of the question, from 0."""
    template: np.ndarray | None
    """Value of the label of the template, as text."""

    @property
    def count(self) -> int:
        """Number of documents."""
        return len(self.sequences)

    @cached_property
    def n_questions(self) -> int:
        """Number of questions."""
        return int(self.question.max()) + 1

    @cached_property
    def answer_rows(self) -> np.ndarray:
        """Index in the sample of the last of the positions of each document."""
        return np.arange(1, self.count + 1) * self.last - 1

    def mean_of_positions(self, values: np.ndarray) -> np.ndarray:
        """Mean over the positions of each document of `values` `(positions, features)`."""
        return values.reshape(self.count, self.last, -1).mean(1)


def choose_documents(
    cache: "ActivationCache",
    split: str,
    last: int,
    labels: AnomalyLabels,
    max_positions: int = 16384,
    seed: int = 0,
) -> AnomalyDocuments:
    """The documents of `split` that have an arm.

    In a cache of answers the position read is the one that predicts the answer's first token; in
    another one the `last` positions of each document are read. Of more than `max_positions` whole
    questions are drawn by `seed`. Raises `UsageError` or `NotFoundError` for a cache that does not
    fit.
    """
    _check_labels(cache, labels)
    if last < 1:
        raise UsageError("the number of last positions is 1 or more")
    is_answer = cache.manifest.capture.positions == "answer"
    if is_answer and last > 1:
        raise UsageError(
            "this cache keeps only the positions of answers, so that one position of each document "
            "is read; for more make the texts with `residua data injection --end question` and "
            "extract them with --no-pack"
        )
    sequences = cache.sequences(split)
    sequences = sequences[cache.sequence_length[sequences] > 0]
    documents = np.asarray(cache.array("sequences/row_id")[:])[sequences]
    # The first run of an answer, or the last piece of a long document.
    order = np.arange(len(sequences)) if is_answer else np.arange(len(sequences))[::-1]
    _, first = np.unique(documents[order], return_index=True)
    chosen = np.sort(sequences[order][first])
    arm = np.asarray(cache.label(labels.arm))[chosen].astype(str)
    chosen, arm = chosen[arm != ""], arm[arm != ""]
    too_short = cache.sequence_length[chosen] < last
    if too_short.any():
        raise UsageError(
            f"{too_short.sum()} documents have fewer than {last} positions; read fewer last ones"
        )
    if not len(chosen):
        raise UsageError(f"the split {split!r} has no document with a label {labels.arm!r}")
    question = np.arange(len(chosen))
    if labels.question is not None and labels.question in cache.label_names:
        values = np.asarray(cache.label(labels.question))[chosen].astype(str)
        question = np.unique(values, return_inverse=True)[1].ravel()
    drawn = _draw_questions(question, max_positions // last, seed)
    chosen, arm = chosen[drawn], arm[drawn]
    question = np.unique(question[drawn], return_inverse=True)[1].ravel()
    start = cache.sequence_start[chosen].astype(np.int64)
    if not is_answer:
        start = start + cache.sequence_length[chosen] - last
    mask = np.zeros(cache.positions, bool)
    mask[(start[:, None] + np.arange(last)).ravel()] = True
    sample = choose_positions(cache, split, cache.positions, where=mask)
    template = None
    if labels.template is not None and labels.template in cache.label_names:
        template = np.asarray(cache.label(labels.template))[chosen].astype(str)
    return AnomalyDocuments(sample, last, chosen, arm, question, template)


def _draw_questions(question: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Mask of the documents of whole questions, drawn until there would be more than `most`."""
    if len(question) <= most:
        return np.ones(len(question), bool)
    sizes = np.bincount(question)
    order = np.random.default_rng(seed).permutation(len(sizes))
    return np.isin(question, order[np.cumsum(sizes[order]) <= most])


def _check_labels(cache: "ActivationCache", labels: AnomalyLabels) -> None:
    """Raise `NotFoundError` without the label of the arm or a clean document."""
    if labels.arm not in cache.label_names:
        known = ", ".join(cache.label_names) or "none"
        raise NotFoundError(
            f"there is no label {labels.arm!r} in this cache (labels: {known}); it tells clean "
            "texts from others: make them with `residua data injection`, extract with --no-pack, "
            "or name the label with --arm"
        )
    values = np.unique(np.asarray(cache.label(labels.arm)).astype(str)).tolist()
    if labels.clean not in values:
        raise NotFoundError(
            f"no document has {labels.arm} = {labels.clean!r} (values: {', '.join(values[:8])}); "
            "name the value of clean ones with --clean"
        )


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """First tokens of the answers of documents, `(documents,)` int64, -1 where unknown."""

    answer: np.ndarray
    wanted: np.ndarray
    note: str
    """How they were found; empty where nothing needs to be said."""


def find_first_tokens(
    documents: AnomalyDocuments, labels: AnomalyLabels, top: np.ndarray
) -> FirstTokens:
    """First tokens of the right answer and of the attacker's, as they stand after the prompt.

    Whether an answer begins with a space is decided by the answers of the texts, which a cache of
    answers holds, else by the model's own top tokens `top` `(documents,)`.
    """
    cache = documents.sample.cache
    unknown = np.full(documents.count, -1, np.int64)
    of_text = documents.sample.text_tokens[documents.answer_rows]
    answer, wanted = of_text.copy(), unknown
    try:
        tokenizer = cache.tokenizer()
    except (ResiduaError, OSError) as error:
        return FirstTokens(answer, wanted, f"the attacker's answer is not known: {error}")
    has_text = bool((of_text >= 0).all())
    words = {
        name: [str(word) for word in np.asarray(cache.label(label))[documents.sequences]]
        for name, label in (("answer", labels.answer), ("wanted", labels.wanted))
        if label in cache.label_names
    }
    if "answer" not in words:
        return FirstTokens(answer, wanted, "without a label of the answer nothing is said of it")
    found = {prefix: _first_ids(tokenizer, words["answer"], prefix) for prefix in (" ", "")}
    reference = of_text if has_text else top
    agreement = {prefix: float((ids == reference).mean()) for prefix, ids in found.items()}
    prefix = max(agreement, key=lambda key: agreement[key])
    note = ""
    if not has_text:
        answer = found[prefix]
        note = "the answers' first tokens come from the tokenizer, not from the text"
    elif agreement[prefix] < 0.9:
        return FirstTokens(
            answer,
            wanted,
            "the attacker's answers are not counted: the tokenizer gives another first token for "
            f"{100 * (1 - agreement[prefix]):.0f} % of the right answers than the text has",
        )
    if "wanted" in words:
        wanted = _first_ids(tokenizer, words["wanted"], prefix)
        # An answer that begins like the right one cannot be told from it.
        wanted[wanted == answer] = -1
    return FirstTokens(answer, wanted, note)


def _first_ids(tokenizer: Any, words: Sequence[str], prefix: str) -> np.ndarray:
    """First token of each word after `prefix`, -1 for an empty word."""
    first: Mapping[str, int] = {
        word: next(iter(tokenizer.encode(prefix + word, add_special_tokens=False).ids), -1)
        for word in set(words)
        if word
    }
    return np.array([first.get(word, -1) for word in words], np.int64)


def find_option_tokens(cache: "ActivationCache", options: Sequence[str]) -> dict[str, int]:
    """First token of each option, after a space; raises `UsageError` where two share one."""
    tokens = {option: int(_first_ids(cache.tokenizer(), [option], " ")[0]) for option in options}
    if len(set(tokens.values())) < len(options) or -1 in tokens.values():
        raise UsageError(
            f"the options {', '.join(options)} do not begin with tokens of their own; give words "
            "that do"
        )
    return tokens
