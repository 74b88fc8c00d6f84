"""What a lens reads in every layer at every token of one passage: numbers of the heatmap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.errors import UsageError
from ..cache.segments import segment_places
from ..probes.readout import Batch, LogitLens, Readout
from .tokentext import token_text

if TYPE_CHECKING:
    import torch

    from ..cache.store import ActivationCache

TOP = 5
"""Tokens kept per cell."""
SEARCHED = 16
SEARCHED_TOKENS = 512
"""Sequences, and tokens of each, that are searched for a telling passage."""
WIDTH = 24
"""Tokens of a passage."""
MOST = 3
"""Most heatmaps that `heatmaps` makes."""


@dataclass(frozen=True)
class Heatmap:
    """A passage as one readout sees it; cells are `(layers, tokens)`, layers from the lowest."""

    probe: str
    """Name of the readout."""
    offset: int
    split: str
    sequence: int
    """Number of the sequence in the cache."""
    start: int
    """Index of the first token in its sequence."""
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """Tokens t that the model read, `(tokens,)`."""
    targets: tuple[str, ...]
    """The model's own top token at t+N, `(tokens,)`."""
    top: tuple[tuple[tuple[str, ...], ...], ...]
    """Likeliest tokens of the readout, `(layers, tokens, top)`."""
    probability: np.ndarray
    """Their probabilities, `(layers, tokens, top)` float32."""
    entropy: np.ndarray
    """Entropy of the readout in nats, `(layers, tokens)` float32."""
    kl: np.ndarray
    """KL(model || readout) in nats, `(layers, tokens)` float32."""


def heatmaps(
    cache: "ActivationCache", readouts: Sequence[Readout], split: str = "test", width: int = WIDTH
) -> list[Heatmap]:
    """One passage through the logit lens and the first readouts of offset 0, `MOST` in all.

    The passage is the one of the first sequences in which the model is sure of most that its
    middle layer does not say yet.
    """
    lenses = [LogitLens.of(cache, (0,))]
    lenses += [r for r in readouts if r.kind != LogitLens.kind and _layers_of(r, 0)]
    sequence, start = telling_passage(cache, split, width)
    return [
        heatmap(cache, lens, split=split, sequence=sequence, start=start, width=width)
        for lens in lenses[:MOST]
    ]


def telling_passage(cache: "ActivationCache", split: str, width: int) -> tuple[int, int]:
    """Sequence and first token of the window where the model's sureness is newest.

    A token counts with the model's largest probability if the logit lens of the middle layer
    has another top token there.
    """
    best = (-1.0, _passage(cache, split, width), 0)
    middle = cache.layers[len(cache.layers) // 2]
    for sequence in cache.split(split)[:SEARCHED]:
        rows = cache.rows(np.array([sequence]))[:SEARCHED_TOKENS]
        if len(rows) < width:
            continue
        logits = cache.head.logits(cache.layer(cache.depth).take(rows))
        early = cache.head.logits(cache.layer(middle).take(rows)).argmax(-1)
        top = logits.max(-1)
        sure = 1 / np.exp(logits - top[:, None]).sum(-1)
        news = np.concatenate([[0.0], np.cumsum(sure * (early != logits.argmax(-1)))])
        windows = news[width:] - news[:-width]
        if len(windows) and windows.max() > best[0]:
            best = (float(windows.max()), int(sequence), int(windows.argmax()))
    return best[1:]


def heatmap(
    cache: "ActivationCache",
    readout: Readout | None = None,
    *,
    offset: int = 0,
    split: str = "test",
    sequence: int | None = None,
    start: int = 0,
    width: int = WIDTH,
) -> Heatmap:
    """Read `width` tokens of a sequence (default: the first of `split` that is long enough).

    `readout` defaults to the logit lens. The passage ends before the first token whose target, at
    t + `offset`, is of another document. Raises `UsageError` if the readout has no layer at this
    offset, or the sequence no token there.
    """
    import torch

    readout = readout or LogitLens.of(cache, (offset,))
    layers = _layers_of(readout, offset)
    if not layers:
        raise UsageError(f"the {readout.kind} readout reads no layer at offset {offset}")
    if sequence is None:
        sequence = _passage(cache, split, start + width + offset)
    first, count = _place(cache, sequence, start, width, offset)
    with torch.inference_mode():
        cells = _Cells(cache, first, count, offset, readout)
        found = [cells.read(layer) for layer in layers]
    names, ids = TokenNames(cache), np.stack([cell[0] for cell in found])
    return Heatmap(
        readout.kind,
        offset,
        split,
        sequence,
        start,
        layers,
        tuple(names(i) for i in cache.tokens[first : first + count]),
        tuple(names(i) for i in cells.model.argmax(-1).tolist()),
        tuple(tuple(tuple(names(i) for i in cell) for cell in row) for row in ids.tolist()),
        *(np.stack([cell[part] for cell in found]) for part in (1, 2, 3)),
    )


def _place(
    cache: "ActivationCache", sequence: int, start: int, width: int, offset: int
) -> tuple[int, int]:
    """First position of the passage, and how many of its tokens have a target."""
    if not 0 <= sequence < len(cache.sequence_length):
        raise UsageError(f"sequence must lie in 0-{len(cache.sequence_length) - 1}, not {sequence}")
    length = int(cache.sequence_length[sequence])
    count = min(width, length - offset - start)
    if count < 1 or start < 0:
        raise UsageError(
            f"sequence {sequence} has {length} tokens: none at {start} with offset {offset}"
        )
    _, left = segment_places(cache, np.array([sequence]))
    alone = np.flatnonzero(left[start : start + count] < offset)
    if len(alone):
        count = int(alone[0])
    if count < 1:
        raise UsageError(
            f"the document at token {start} of sequence {sequence} ends within the next {offset} "
            "tokens; take another start"
        )
    return int(cache.sequence_start[sequence]) + start, count


class _Cells:
    """One passage, read layer by layer."""

    def __init__(
        self, cache: "ActivationCache", first: int, count: int, offset: int, readout: Readout
    ) -> None:
        import torch

        self.cache, self.first, self.count = cache, first, count
        self.readout, self.offset = readout, offset
        self.head = cache.head.torch()
        last = cache.tokens[first + offset : first + offset + count].astype(np.int64)
        self.last = torch.from_numpy(last)
        self.model = self.head(self._hidden(cache.depth, offset)).log_softmax(-1)

    def read(self, layer: int) -> tuple[np.ndarray, ...]:
        """Top ids, their probabilities, entropy and KL of one layer; `(tokens, ...)`."""
        batch = Batch(self._hidden(layer, 0), self.last, self.head)
        log_q = self.readout.logits(batch, layer, self.offset).float().log_softmax(-1)
        q, p = log_q.exp(), self.model.exp()
        top = q.topk(min(TOP, q.shape[-1]), dim=-1)
        entropy = -(q * log_q).masked_fill_(q == 0, 0.0).sum(-1)
        kl = (p * (self.model - log_q)).masked_fill_(p == 0, 0.0).sum(-1).clamp_min_(0.0)
        return tuple(value.numpy() for value in (top.indices, top.values, entropy, kl))

    def _hidden(self, layer: int, shift: int) -> "torch.Tensor":
        import torch

        start = self.first + shift
        # A copy: rows read through a memory map may be read-only.
        return torch.from_numpy(np.array(self.cache.layer(layer)[start : start + self.count]))


def _layers_of(readout: Readout, offset: int) -> tuple[int, ...]:
    return tuple(sorted({la for la, n in readout.pairs() if la is not None and n == offset}))


def _passage(cache: "ActivationCache", split: str, tokens: int) -> int:
    """The first sequence of `split` with that many tokens, else its longest."""
    numbers = cache.split(split)
    if not len(numbers):
        raise UsageError(f"the {split} split of this cache is empty")
    lengths = cache.sequence_length[numbers]
    enough = np.flatnonzero(lengths >= tokens)
    return int(numbers[enough[0] if len(enough) else np.argmax(lengths)])


class TokenNames:
    """Readable names of token ids: `␣` for a space, `\\n` for a line break, `#7` if unknown."""

    def __init__(self, cache: "ActivationCache") -> None:
        has = (cache.path / "head" / "tokenizer.json").is_file()
        self.tokenizer: Any = cache.tokenizer() if has else None

    def __call__(self, token: int) -> str:
        text = token_text(self.tokenizer, token) if self.tokenizer else None
        return f"#{int(token)}" if text is None else visible(text)


def visible(text: str) -> str:
    """Spaces as `␣`, control characters escaped, everything else as it is."""
    shown = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
