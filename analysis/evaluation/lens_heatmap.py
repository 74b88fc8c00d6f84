"""Lens heatmaps: the likeliest token of a lens in every layer at every token of one passage.

`heatmap` computes the numbers, `Evaluation.heatmaps` chooses the passage and the lenses, and
analysis/report/ draws the result (static_figures.py, interactive_figures.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...cache.devices import TileRows, choose_device, copy_to_device, copy_to_host
from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_whole_number, format_ranges
from ...cache.tokens.segments import segment_indices
from ...probes.base.readout import Readout, ReadoutBatch, check_readout
from ...probes.lens.logit_lens import LogitLens
from ...probes.saved.save import check_belongs
from ..token_texts.token_names import TokenNames
from .comparison import compare_pairs
from .distributions import Reference, top_token

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

TOP = 5
"""Likeliest tokens of each cell."""
SEARCHED_SEQUENCES = 16
"""Sequences that are searched for a telling passage."""
SEARCHED_TOKENS = 512
"""Tokens of each of these sequences that are searched."""
WIDTH = 24
"""Tokens of a passage."""


@dataclass(frozen=True)
class Heatmap:
    """What one lens reads in a passage; cells are `(layers, tokens)`, lowest layer first.

    Where logits are no distribution, tokens are `UNDEFINED` and numbers are NaN.
    """

    probe: str
    """Kind of the lens, such as `logit` or `ridge`."""
    offset: int
    """The lens predicts the model's token after t+offset."""
    split: str
    """Split of the passage, for titles."""
    sequence: int
    """Number of the sequence in the cache."""
    start: int
    """Index of the first token in its sequence."""
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """Labels of the tokens t that the model read, `(tokens,)`."""
    targets: tuple[str, ...]
    """Labels of the model's own top token at t+N, `(tokens,)`."""
    top: tuple[tuple[tuple[str, ...], ...], ...]
    """Labels of the lens's likeliest tokens, `(layers, tokens, top)`."""
    probability: np.ndarray
    """Their probabilities, `(layers, tokens, top)` float32."""
    entropy: np.ndarray
    """Entropy of the lens's distribution in nats, `(layers, tokens)` float32."""
    kl: np.ndarray
    """KL(model || lens) in nats, `(layers, tokens)` float32."""


def heatmaps(
    cache: "ActivationCache",
    readouts: "Sequence[Readout] | Mapping[str, Readout]",
    split: str = "test",
    width: int = WIDTH,
    device: "str | torch.device" = "auto",
    passages: int = 1,
) -> list[Heatmap]:
    """Heatmaps of telling passages: the logit lens and every lens among `readouts`, in each.

    Lenses are readouts with layers at offset 0; those of a mapping have its names, others the names
    of their kinds. At most `passages` passages, each of another sequence, the most telling first;
    the heatmaps of one passage follow each other. Computed on `device`, see `heatmap`.
    """
    named = readouts.items() if isinstance(readouts, Mapping) else ((r.kind, r) for r in readouts)
    lenses: list[tuple[str, Readout]] = [(LogitLens.kind, LogitLens.of(cache, (0,)))]
    lenses += [(name, r) for name, r in named if r.kind != LogitLens.kind and _layers_at(r, 0)]
    device = choose_device(device)
    return [
        replace(
            heatmap(
                cache, lens, split=split, sequence=sequence, start=start, width=width, device=device
            ),
            probe=name,
        )
        for sequence, start in find_telling_passages(cache, split, width, device, passages)
        for name, lens in lenses
    ]


def find_telling_passages(
    cache: "ActivationCache", split: str, width: int, device: "torch.device", count: int = 1
) -> list[tuple[int, int]]:
    """Sequences and first tokens of passages in which most is decided in the upper layers.

    Each token scores the model's largest probability, if the logit lens of the middle layer has
    another top token; a passage has the sum of the scores of its `width` tokens. At most `count`
    passages with the largest sums, the best of each of the first sequences; one at least, which
    may be shorter.
    """
    found: list[tuple[float, int, int]] = []
    scorer = _TokenScorer(cache, device)
    for sequence in cache.sequences(split)[:SEARCHED_SEQUENCES]:
        rows = cache.positions_of(np.array([sequence]))[:SEARCHED_TOKENS]
        if len(rows) < width:
            continue
        # Sum of the scores of every window of `width` tokens.
        cumulative = np.concatenate([[0.0], np.cumsum(scorer.scores(rows))])
        window_scores = cumulative[width:] - cumulative[:-width]
        if len(window_scores):
            start = int(window_scores.argmax())
            found.append((float(window_scores[start]), int(sequence), start))
    if not found:
        return [(_first_long_sequence(cache, split, width), 0)]
    found.sort(key=lambda passage: -passage[0])  # the first of equal ones stays first
    return [(sequence, start) for _, sequence, start in found[:count]]


class _TokenScorer:
    """Scores positions by what `find_telling_passages` looks for, on one device."""

    def __init__(self, cache: "ActivationCache", device: "torch.device") -> None:
        self.head, self.device = cache.head.torch(device), device
        middle = cache.layers[len(cache.layers) // 2]
        self._arrays = [cache.residual_array(layer) for layer in (cache.n_blocks, middle)]
        self._tiles = TileRows(SEARCHED_TOKENS, device)

    def scores(self, positions: np.ndarray) -> np.ndarray:
        """The score of each of `positions` `(n,)`, float64; 0 where nothing is defined."""
        import torch

        scores = np.zeros(len(positions))

        def score(tile: slice) -> None:
            last, middle = (
                self.head(
                    copy_to_device(torch.from_numpy(array.take(positions[tile])), self.device)
                )
                for array in self._arrays
            )
            reference = Reference.of(last, torch.full_like(top_token(last), -1))
            # Logits that are no distribution (NaN, +inf) score 0.
            counts = reference.defined & (top_token(middle) != reference.top)
            scores[tile] = np.where(copy_to_host(counts).numpy(), reference.confidence, 0.0)

        with torch.no_grad():
            self._tiles.run(len(positions), score)
        return scores


def heatmap(
    cache: "ActivationCache",
    readout: Readout | None = None,
    *,
    offset: int = 0,
    split: str = "test",
    sequence: int | None = None,
    start: int = 0,
    width: int = WIDTH,
    force: bool = False,
    device: "str | torch.device" = "auto",
) -> Heatmap:
    """Heatmap of `width` tokens of a sequence, from token `start` on, as `readout` reads them.

    `readout` defaults to the logit lens, `sequence` to the first of `split` that is long enough. A
    control reads the rows of its view of the cache. The passage ends before the first token whose
    target, `offset` tokens later, is of another document. Raises `NotFoundError` if the readout has
    no layer at this offset, `UsageError` if the sequence has no token at `start`, `MismatchError`
    for a readout of another model, unless `force`. Computed on `device`: `auto` is the first GPU,
    else the CPU; `ModelError` for one that cannot be used.
    """
    import torch

    cache.check_texts("it has no passage of text")
    offset, start = as_whole_number(offset, "offset"), as_whole_number(start, "start")
    width = as_whole_number(width, "width")
    readout = readout or LogitLens.of(cache, (offset,))
    check_readout(readout)
    check_belongs(readout, cache, force)
    layers = _layers_at(readout, offset)
    if not layers:
        layer_offsets = sorted({n for layer, n in readout.pairs() if layer is not None})
        explanation = (
            f"it reads layers at offsets {format_ranges(layer_offsets)}"
            if layer_offsets
            else "it reads no layer at all"
        )
        raise NotFoundError(
            f"the {readout.kind} readout reads no layer at offset {offset}: {explanation}"
        )
    if sequence is None:
        sequence = _first_long_sequence(cache, split, start + width + offset)
    sequence = as_whole_number(sequence, "sequence")
    first, count = _passage_positions(cache, sequence, start, width, offset)

    with torch.no_grad():
        reader = _PassageReader(cache, readout, first, count, offset, choose_device(device))
        cells = [reader.read(layer) for layer in layers]

    names = TokenNames(cache)
    top_ids = np.stack([layer_cells.top_ids for layer_cells in cells])
    return Heatmap(
        probe=readout.kind,
        offset=offset,
        split=split,
        sequence=sequence,
        start=start,
        layers=layers,
        tokens=tuple(names(token) for token in cache.tokens[first : first + count]),
        targets=tuple(names(token) for token in reader.targets.tolist()),
        top=tuple(
            tuple(tuple(names(token) for token in cell) for cell in layer_ids)
            for layer_ids in top_ids.tolist()
        ),
        probability=np.stack([layer_cells.probability for layer_cells in cells]),
        entropy=np.stack([layer_cells.entropy for layer_cells in cells]),
        kl=np.stack([layer_cells.kl for layer_cells in cells]),
    )


def _layers_at(readout: Readout, offset: int) -> tuple[int, ...]:
    """Layers that `readout` reads at `offset`, ascending."""
    return tuple(sorted({la for la, n in readout.pairs() if la is not None and n == offset}))


def _first_long_sequence(cache: "ActivationCache", split: str, tokens: int) -> int:
    """Number of the first sequence of `split` with `tokens` tokens, else of the longest one."""
    numbers = cache.sequences(split)
    if not len(numbers):
        raise UsageError(f"the {split} split of this cache is empty")
    lengths = cache.sequence_length[numbers]
    long_enough = np.flatnonzero(lengths >= tokens)
    return int(numbers[long_enough[0] if len(long_enough) else np.argmax(lengths)])


def _passage_positions(
    cache: "ActivationCache", sequence: int, start: int, width: int, offset: int
) -> tuple[int, int]:
    """First position of the passage in the cache, and the number of its tokens with a target."""
    if not 0 <= sequence < len(cache.sequence_length):
        raise UsageError(f"sequence must lie in 0-{len(cache.sequence_length) - 1}, not {sequence}")
    length = int(cache.sequence_length[sequence])
    count = min(width, length - offset - start)
    if count < 1 or start < 0:
        raise UsageError(
            f"sequence {sequence} has {length} tokens: none at {start} with offset {offset}"
        )
    # The target must lie in the document of its token.
    _, tokens_after = segment_indices(cache, np.array([sequence]))
    without_target = np.flatnonzero(tokens_after[start : start + count] < offset)
    if len(without_target):
        count = int(without_target[0])
    if count < 1:
        raise UsageError(
            f"the document at token {start} of sequence {sequence} ends within the next {offset} "
            "tokens; take another start"
        )
    return int(cache.sequence_start[sequence]) + start, count


class _LayerCells(NamedTuple):
    """The cells of one layer of a heatmap."""

    top_ids: np.ndarray
    """Ids of the likeliest tokens, -1 where undefined, `(tokens, top)` int64."""
    probability: np.ndarray
    """Their probabilities, `(tokens, top)` float32."""
    entropy: np.ndarray
    """Entropy in nats, `(tokens,)` float32."""
    kl: np.ndarray
    """KL(model || lens) in nats, NaN where undefined, `(tokens,)` float32."""


class _PassageReader:
    """Reads a passage, `count` positions from `first` on, layer by layer through `readout`."""

    def __init__(
        self,
        cache: "ActivationCache",
        readout: Readout,
        first: int,
        count: int,
        offset: int,
        device: "torch.device",
    ) -> None:
        import torch

        view = getattr(readout, "view", None)
        self.source = view(cache) if view else cache
        self.readout, self.first, self.count, self.offset = readout, first, count, offset
        self.device = device
        self.head = cache.head.torch(device)
        self.last_token, self.token = (
            copy_to_device(
                torch.from_numpy(cache.tokens[start : start + count].astype(np.int64)), device
            )
            for start in (first + offset, first)
        )
        # The model's own distribution at the targets.
        logits = self.head(self._states(cache, cache.n_blocks, first + offset))
        self.reference = Reference.of(logits, torch.full_like(self.last_token, -1))
        self.targets = self.reference.top.masked_fill(~self.reference.defined, -1)

    def read(self, layer: int) -> _LayerCells:
        """The cells of one layer."""
        batch = ReadoutBatch(
            hidden=self._states(self.source, layer, self.first),
            last_token=self.last_token,
            head=self.head,
            token=self.token,
        )
        logits = self.readout.logits(batch, layer, self.offset).float()
        compared = compare_pairs(self.reference, logits, rank_limit=1)
        log_q = logits.log_softmax(-1)
        q = log_q.exp()
        likeliest = q.topk(min(TOP, q.shape[-1]), dim=-1)
        entropy = -(q * log_q).masked_fill_(q == 0, 0.0).sum(-1)
        undefined = ~compared.defined
        return _LayerCells(
            top_ids=copy_to_host(likeliest.indices.masked_fill(undefined[:, None], -1)).numpy(),
            probability=copy_to_host(likeliest.values).numpy(),
            entropy=copy_to_host(entropy).numpy(),
            kl=copy_to_host(
                compared.kl.masked_fill(undefined | ~self.reference.defined, math.nan)
            ).numpy(),
        )

    def _states(self, cache: "ActivationCache", layer: int, start: int) -> "torch.Tensor":
        """Residual stream of `layer` at the positions from `start` on, `(tokens, d_model)`."""
        import torch

        # A copy: rows read through a memory map may be read-only.
        rows = np.array(cache.residual_array(layer)[start : start + self.count])
        return copy_to_device(torch.from_numpy(rows), self.device)
