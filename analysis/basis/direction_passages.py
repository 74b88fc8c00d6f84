"""Passages around the positions at which a direction's coordinate is largest and smallest.

`read_directions` (direction_readings.py) makes one `PassageFinder` for all layers and directions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.tokens import context_indices, document_of, sequence_of
from ..token_texts import TokenNames
from .token_changes import shorten_label

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

TOKENS_BEFORE = 12
"""Tokens of a passage before its position."""
TOKENS_AFTER = 6
"""Tokens of a passage after its position."""
LETTERS_BEFORE = 160
"""Most letters of the text before; of longer texts the end is kept, after an ellipsis."""
LETTERS_AFTER = 80
"""Most letters of the text after; of longer texts the beginning is kept, before an ellipsis."""


@dataclass(frozen=True)
class Passage:
    """A position with the text around it, inside its document; letters are printable."""

    position: int
    """Position in the cache."""
    document: int
    """Number of its document."""
    before: str
    """Text of the tokens before, as printable letters; spaces are spaces."""
    token: str
    """Label of the token at the position; `␣` is a space."""
    after: str
    """Text of the tokens after."""
    coordinate: float
    """Distance from the basis's reference, in standard deviations of the coordinate."""


class PassageFinder:
    """Finds the extremes of coordinates over `positions`, and reads the text around them."""

    def __init__(self, cache: "ActivationCache", positions: np.ndarray, names: TokenNames) -> None:
        self.cache = cache
        self.positions = positions
        self.names = names
        self.documents: np.ndarray = document_of(cache, positions)
        """Number of the document of each position, `(n,)`."""
        # A cache of one document gives a passage per sequence.
        units = self.documents
        self.units: np.ndarray = (
            units if len(np.unique(units)) > 1 else sequence_of(cache, positions)
        )
        """Each unit gives one passage at most, `(n,)`."""

    def extremes(
        self, coordinates: np.ndarray, count: int
    ) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
        """Passages at the `count` largest `coordinates` `(n,)`, then at the smallest ones.

        The most extreme ones stand first. At either end a document gives one passage at most; of
        equal coordinates, the first position is taken.
        """
        highest, lowest = (
            self._first_of_units(np.argsort(sign * coordinates, kind="stable"))[:count]
            for sign in (-1, 1)
        )
        return self._read_all(highest, coordinates), self._read_all(lowest, coordinates)

    def _first_of_units(self, order: np.ndarray) -> np.ndarray:
        """The indices `order` `(n,)` without those whose unit has come before."""
        _, first = np.unique(self.units[order], return_index=True)
        return order[np.sort(first)]

    def _read_all(self, indices: np.ndarray, coordinates: np.ndarray) -> tuple[Passage, ...]:
        return tuple(self._read(int(index), float(coordinates[index])) for index in indices)

    def _read(self, index: int, coordinate: float) -> Passage:
        """The passage of `positions[index]`."""
        position = int(self.positions[index])
        ids, token = self._surroundings(position)
        before = self.names.passage(ids[:token])
        after = self.names.passage(ids[token + 1 :])
        if len(before) > LETTERS_BEFORE:
            before = "…" + before[1 - LETTERS_BEFORE :]
        if len(after) > LETTERS_AFTER:
            after = after[: LETTERS_AFTER - 1] + "…"
        label = shorten_label(self.names.label_read_token(int(ids[token])))
        document = int(self.documents[index])
        return Passage(position, document, before, label, after, coordinate)

    def _surroundings(self, position: int) -> tuple[np.ndarray, int]:
        """Token ids around a position of its document and context, and the index of its own."""
        contexts = self.cache.contexts
        positions = np.array([position])
        context = self.cache.sequence_context[sequence_of(self.cache, positions)[0]]
        start, length = int(contexts.start[context]), int(contexts.length[context])
        token = start + int(context_indices(self.cache, positions)[0])
        first = max(start, token - TOKENS_BEFORE)
        last = min(start + length, token + TOKENS_AFTER + 1)
        ids, own = contexts.ids.read(first, last), token - first
        if self.cache.context_document_numbers is not None:
            documents = self.cache.context_document_numbers.read(first, last)
            borders = np.flatnonzero(documents != documents[own])
            begin = int(borders[borders < own].max(initial=-1)) + 1
            end = int(borders[borders > own].min(initial=len(ids)))
            ids, own = ids[begin:end], own - begin
        return ids, own
