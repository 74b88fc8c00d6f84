"""Tables of how two models differ: by token, by passage, by depth of a lens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....cache.store.activation_cache import ActivationCache
from ....probes.base.resampling import Interval
from ...token_texts.token_names import TokenNames
from .joined_sequences import JoinedSample
from .model_divergence import LayerPair, ModelDivergence
from .token_groups import BAND_NAMES, CLASSES, band_of_token, class_of_token

WINDOW = 16
"""Tokens of a passage."""
AROUND = 8
"""Tokens of text shown before a passage."""
MOST_PASSAGES = 10
MOST_TOKENS = 20
FEWEST = 10
"""Fewest positions of a token in the table of tokens."""
TINY = 1e-3
"""Final divergence, in nats, below which a pair of models does not part at a position."""


@dataclass(frozen=True)
class DivergenceRow:
    """How two models differ in one group of positions."""

    group: str
    """`all`, a class of the text's next token, or a band of its frequency in the first cache."""
    kind: str
    """`all`, `class` or `frequency`."""
    n: int
    share: float
    """Share of the positions."""
    disagreement: float | None
    """Share of positions with different top tokens."""
    disagreement_interval: Interval
    js: float | None
    """Mean Jensen-Shannon divergence, nats."""
    js_interval: Interval
    kl: float | None
    """Mean KL(first || other), nats."""
    kl_interval: Interval
    reverse: float | None
    """Mean KL(other || first), nats."""
    reverse_interval: Interval
    cross_entropy: float | None
    """Mean -log p of the text's next token under the first model, nats."""
    cross_entropy_difference: float | None
    """Mean of the other model's less the first one's, nats."""
    cross_entropy_difference_interval: Interval


@dataclass(frozen=True)
class DepthDivergenceRow:
    """How a lens of each model differs at a pair of layers."""

    lens: str
    first_layer: int
    other_layer: int
    depth: float
    """Relative depth l / L of the first model's layer."""
    n: int
    js: float | None
    js_interval: Interval
    share_of_final: float | None
    """Mean JS as a share of that of the models."""
    disagreement: float | None
    equal_states: float | None
    """Share of positions whose residual streams are equal bit for bit; None for other widths."""


@dataclass(frozen=True)
class PartingRow:
    """Where two models part under a lens."""

    lens: str
    final_js: float | None
    layer: int | None
    """First layer of the first model whose mean JS is more than half of the final mean."""
    depth: float | None
    depth_interval: Interval
    by_position: float | None
    """Mean over positions of the relative depth of the first layer above half of the position's
    own final JS."""
    by_position_interval: Interval
    n: int
    """Positions whose final JS is above 0.001 nats, which `by_position` counts."""


@dataclass(frozen=True)
class TokenDivergenceRow:
    """A next token of the text at which two models differ most."""

    token: str
    n: int
    js: float
    disagreement: float
    cross_entropy: float | None
    cross_entropy_difference: float | None


@dataclass(frozen=True)
class PassageRow:
    """A passage in which two models differ much; at most one of a document."""

    sequence: int
    """Number of the sequence in the first cache."""
    index: int
    """Index of the first token of the passage in its context."""
    js: float
    """Mean over the passage."""
    before: str
    passage: str
    at: str
    """Token of the passage after which the models differ most."""
    at_js: float
    first: str
    """Likeliest tokens of the first model there, with probabilities."""
    other: str
    text: str
    """Next token of the text there."""


@dataclass(frozen=True)
class SimilarityRow:
    """Linear CKA of two layers."""

    first_layer: int
    other_layer: int
    cka: float | None
    n: int


GROUP_HEADINGS = {
    "kind": "group",
    "group": "next token",
    "n": "n",
    "disagreement": "other top token",
    "disagreement_interval": "95 %",
    "js": "JS, nats",
    "js_interval": "95 %",
    "kl": "KL(1 || 2)",
    "reverse": "KL(2 || 1)",
    "cross_entropy": "CE of 1, nats",
    "cross_entropy_difference": "CE of 2 less",
    "cross_entropy_difference_interval": "95 %",
}
DEPTH_HEADINGS = {
    "lens": "lens",
    "first_layer": "layer of 1",
    "other_layer": "layer of 2",
    "depth": "depth",
    "js": "JS, nats",
    "js_interval": "95 %",
    "share_of_final": "of the final JS",
    "disagreement": "other top token",
    "equal_states": "equal states",
}
PARTING_HEADINGS = {
    "lens": "lens",
    "final_js": "final JS, nats",
    "layer": "parts at layer",
    "depth": "depth",
    "depth_interval": "95 %",
    "by_position": "depth by position",
    "by_position_interval": "95 %",
    "n": "n",
}
TOKEN_HEADINGS = {
    "token": "next token",
    "n": "n",
    "js": "JS, nats",
    "disagreement": "other top token",
    "cross_entropy": "CE of 1, nats",
    "cross_entropy_difference": "CE of 2 less",
}
PASSAGE_HEADINGS = {
    "js": "JS, nats",
    "before": "text before",
    "passage": "passage",
    "at": "most after",
    "at_js": "JS there",
    "first": "1 says",
    "other": "2 says",
    "text": "text",
}
SIMILARITY_HEADINGS = {
    "first_layer": "layer of 1",
    "other_layer": "layer of 2",
    "cka": "CKA",
    "n": "n",
}


class DivergenceTables:
    """Tables of what was measured at the positions of a sample."""

    def __init__(self, sample: JoinedSample, found: ModelDivergence) -> None:
        self.sample: JoinedSample = sample
        self.found: ModelDivergence = found
        self.cache: ActivationCache = sample.first.cache
        self.names: TokenNames = TokenNames(self.cache)
        self.difference: np.ndarray = found.cross_entropy[1] - found.cross_entropy[0]

    def group_rows(self) -> list[DivergenceRow]:
        """All positions, then by class and by frequency of the text's next token."""
        text = self.sample.first.text_tokens
        rows = [self._group_row("all", "all", np.ones(len(text), bool))]
        classes = class_of_token(self.cache)
        groups: list[tuple[str, Sequence[str], np.ndarray | None]] = [
            ("class", CLASSES, classes),
            ("frequency", BAND_NAMES, band_of_token(self.cache)),
        ]
        for kind, names, numbers in groups:
            if numbers is None:
                continue
            of_position = np.where(text >= 0, numbers[np.maximum(text, 0)], -1)
            for number, name in enumerate(names):
                if (chosen := of_position == number).any():
                    rows.append(self._group_row(name, kind, chosen))
        return rows

    def _group_row(self, group: str, kind: str, chosen: np.ndarray) -> DivergenceRow:
        """Means over the `chosen` positions, a bool mask."""
        found, mean = self.found, self.sample.first.mean

        def of(values: np.ndarray) -> tuple[float | None, Interval]:
            return mean(np.where(chosen, values, np.nan))

        measured = {
            "disagreement": of(found.differs),
            "js": of(found.js),
            "kl": of(found.kl),
            "reverse": of(found.reverse),
            "cross_entropy_difference": of(self.difference),
        }
        fields: dict[str, Any] = {}
        for name, (value, interval) in measured.items():
            fields |= {name: value, f"{name}_interval": interval}
        return DivergenceRow(
            group=group,
            kind=kind,
            n=int(chosen.sum()),
            share=float(chosen.mean()),
            cross_entropy=of(found.cross_entropy[0])[0],
            **fields,
        )

    def depth_rows(self) -> list[DepthDivergenceRow]:
        """A row for each lens and pair of layers."""
        rows = []
        for name, lens in self.found.lenses.items():
            final, _ = self.sample.first.mean(lens.js[:, -1])
            for column, pair in enumerate(lens.pairs):
                js, interval = self.sample.first.mean(lens.js[:, column])
                equal = self.found.equal_states.get(pair)
                rows.append(
                    DepthDivergenceRow(
                        lens=str(name),
                        first_layer=pair.first,
                        other_layer=pair.other,
                        depth=pair.depth,
                        n=int((~np.isnan(lens.js[:, column])).sum()),
                        js=js,
                        js_interval=interval,
                        share_of_final=js / final if js is not None and final else None,
                        disagreement=self.sample.first.mean(lens.differs[:, column])[0],
                        equal_states=None if equal is None else float(equal.mean()),
                    )
                )
        return rows

    def parting_rows(self) -> list[PartingRow]:
        """A row for each lens."""
        return [
            parting_row(self.sample, str(name), lens.pairs, lens.js)
            for name, lens in self.found.lenses.items()
        ]

    def token_rows(self) -> list[TokenDivergenceRow]:
        """Next tokens of the text with the largest mean JS, of those that occur often enough."""
        text = self.sample.first.text_tokens
        known = (text >= 0) & ~np.isnan(self.found.js)
        tokens, numbers, counts = np.unique(text[known], return_inverse=True, return_counts=True)
        if not len(tokens):
            return []

        def means(values: np.ndarray) -> np.ndarray:
            return np.bincount(numbers, values[known].astype(np.float64)) / counts

        js, differs = means(self.found.js), means(self.found.differs)
        own, change = means(self.found.cross_entropy[0]), means(self.difference)
        order = [n for n in np.argsort(-js, kind="stable").tolist() if counts[n] >= FEWEST]
        return [
            TokenDivergenceRow(
                token=self.names(int(tokens[n])),
                n=int(counts[n]),
                js=float(js[n]),
                disagreement=float(differs[n]),
                cross_entropy=known_value(float(own[n])),
                cross_entropy_difference=known_value(float(change[n])),
            )
            for n in order[:MOST_TOKENS]
        ]

    def passage_rows(self) -> list[PassageRow]:
        """Windows of `WINDOW` tokens with the largest mean JS, at most one of a document."""
        sample, js = self.sample.first, np.nan_to_num(self.found.js.astype(np.float64))
        if len(js) < WINDOW:
            return []
        totals = np.concatenate([[0.0], np.cumsum(js)])
        starts = np.arange(len(js) - WINDOW + 1)
        units, sequences = sample.unit_numbers, sample.sequence_numbers
        inside = (units[starts] == units[starts + WINDOW - 1]) & (
            sequences[starts] == sequences[starts + WINDOW - 1]
        )
        starts = starts[inside]
        means = (totals[starts + WINDOW] - totals[starts]) / WINDOW
        rows, seen = [], set[int]()
        for n in np.argsort(-means, kind="stable").tolist():
            if len(rows) == MOST_PASSAGES or means[n] <= 0:
                break
            unit = int(units[starts[n]])
            if unit not in seen:
                seen.add(unit)
                rows.append(self._passage_row(int(starts[n]), float(means[n])))
        return rows

    def _passage_row(self, start: int, js: float) -> PassageRow:
        """The passage that begins at the position number `start` of the sample."""
        sample, found, names = self.sample.first, self.found, self.names
        worst = start + int(np.nanargmax(found.js[start : start + WINDOW]))
        first_of_sequence = int(
            np.searchsorted(sample.sequence_numbers, sample.sequence_numbers[start])
        )
        before = slice(max(first_of_sequence, start - AROUND), start)

        def says(model: int) -> str:
            top, p = found.top[model][worst], found.p_top[model][worst]
            pairs = zip(top[:3].tolist(), p[:3].tolist(), strict=True)
            return "  ".join(f"{names(token)} {value:.2f}" for token, value in pairs)

        return PassageRow(
            sequence=int(sample.sequence_numbers[start]),
            index=int(sample.indices[start]),
            js=js,
            before=names.passage(sample.tokens[before].tolist()),
            passage=names.passage(sample.tokens[start : start + WINDOW].tolist()),
            at=names(int(sample.tokens[worst])),
            at_js=float(found.js[worst]),
            first=says(0),
            other=says(1),
            text="-" if (text := int(sample.text_tokens[worst])) < 0 else names(text),
        )


def parting_row(
    sample: JoinedSample, lens: str, pairs: tuple[LayerPair, ...], js: np.ndarray
) -> PartingRow:
    """Where the models part under one lens, from JS `(n, pairs)`."""
    depths = np.array([pair.depth for pair in pairs])
    known = ~np.isnan(js).any(1)
    final, _ = sample.first.mean(np.where(known, js[:, -1], np.nan))
    if final is None or final <= 0:
        none: Interval = (None, None)
        return PartingRow(
            lens=lens,
            final_js=final,
            layer=None,
            depth=None,
            depth_interval=none,
            by_position=None,
            by_position_interval=none,
            n=0,
        )
    # Of the mean over documents, and of its resamples.
    units, count = sample.first.unit_numbers[known], sample.first.units.n_resampled
    sums = np.stack(
        [np.bincount(units, column, count) for column in js[known].T.astype(np.float64)]
    )
    column = int(_first_above_half(sums.sum(1)[None])[0])
    interval: Interval = (None, None)
    if np.count_nonzero(np.bincount(units, minlength=count)) > 1:
        resampled = sample.first.weights @ sums.T
        columns = _first_above_half(resampled[resampled[:, -1] > 0])
        if len(columns):
            low, high = np.percentile(depths[columns], (2.5, 97.5))
            interval = float(low), float(high)
    # Of each position by itself.
    parts = known & (js[:, -1] > TINY)
    by_position = np.full(len(js), np.nan)
    by_position[parts] = depths[_first_above_half(js[parts])]
    mean, mean_interval = sample.first.mean(by_position)
    return PartingRow(
        lens=lens,
        final_js=final,
        layer=pairs[column].first,
        depth=float(depths[column]),
        depth_interval=interval,
        by_position=mean,
        by_position_interval=mean_interval,
        n=int(parts.sum()),
    )


def _first_above_half(js: np.ndarray) -> np.ndarray:
    """First column of each row of `(rows, pairs)` above half of the last column."""
    return (js > js[:, -1:] / 2).argmax(1)


def known_value(value: float) -> float | None:
    """A float; None for NaN."""
    return None if np.isnan(value) else float(value)
