"""What a lens reads in every layer at every token of one passage: numbers of the heatmap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_whole_number, format_ranges
from ...cache.tokens.segments import segment_indices
from ...probes.base.readout import Readout, ReadoutBatch
from ...probes.lens.logit_lens import LogitLens
from ...probes.saved.save import check_belongs
from .metrics import Reference, divergences, first_max, is_distribution
from .token_text import byte_text, token_text

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

TOP = 5
"""Tokens kept per cell."""
SEARCHED = 16
SEARCHED_TOKENS = 512
"""Sequences, and tokens of each, that are searched for a telling passage."""
WIDTH = 24
"""Tokens of a passage."""
UNDEFINED = "no token"
"""Stands for the token where logits are no distribution (NaN, +inf); no label holds a space."""
JOINERS = "\u200c\u200d"
"""Invisible letters that shape their neighbours."""
MOST = 3
"""Most heatmaps that `heatmaps` makes."""


@dataclass(frozen=True)
class Heatmap:
    """A passage as one readout sees it; cells are `(layers, tokens)`, layers from the lowest.

    Where logits are no distribution the tokens are `UNDEFINED` and the numbers NaN.
    """

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
    for sequence in cache.sequences(split)[:SEARCHED]:
        rows = cache.positions_of(np.array([sequence]))[:SEARCHED_TOKENS]
        if len(rows) < width:
            continue
        logits = cache.head.logits(cache.residual_array(cache.n_blocks).take(rows))
        early = cache.head.logits(cache.residual_array(middle).take(rows)).argmax(-1)
        top = logits.max(-1)
        # Logits that are no distribution (NaN, +inf) make nobody sure.
        finite = np.isfinite(top)
        sure = np.zeros(len(rows))
        sure[finite] = 1 / np.exp(logits[finite] - top[finite, None]).sum(-1)
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
    force: bool = False,
) -> Heatmap:
    """Read `width` tokens of a sequence (default: the first of `split` that is long enough).

    `readout` defaults to the logit lens; a control reads the rows of its view of the cache. The
    passage ends before the first token whose target, at t + `offset`, is of another document.
    Raises `NotFoundError` if the readout has no layer at this offset, `UsageError` if the sequence
    has no token there, `MismatchError` for a readout of another model, unless `force`.
    """
    import torch

    offset, start = as_whole_number(offset, "offset"), as_whole_number(start, "start")
    width = as_whole_number(width, "width")
    readout = readout or LogitLens.of(cache, (offset,))
    check_belongs(readout, cache, force)
    layers = _layers_of(readout, offset)
    if not layers:
        has = sorted({n for la, n in readout.pairs() if la is not None})
        says = (
            f"it reads layers at offsets {format_ranges(has)}"
            if has
            else "it reads no layer at all"
        )
        raise NotFoundError(f"the {readout.kind} readout reads no layer at offset {offset}: {says}")
    if sequence is None:
        sequence = _passage(cache, split, start + width + offset)
    sequence = as_whole_number(sequence, "sequence")
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
        tuple(names(i) for i in cells.targets.tolist()),
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
    _, left = segment_indices(cache, np.array([sequence]))
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

        view = getattr(readout, "view", None)
        self.source = view(cache) if view else cache
        self.first, self.count = first, count
        self.readout, self.offset = readout, offset
        self.head = cache.head.torch()
        self.last, self.token = (
            torch.from_numpy(cache.tokens[place : place + count].astype(np.int64))
            for place in (first + offset, first)
        )
        logits = self.head(self._hidden(cache, cache.n_blocks, offset))
        self.reference = Reference.of(logits, torch.full_like(self.last, -1))
        self.targets = self.reference.top.masked_fill(~self.reference.defined, -1)

    def read(self, layer: int) -> tuple[np.ndarray, ...]:
        """Top ids, their probabilities, entropy and KL of one layer; `(tokens, ...)`."""
        hidden = self._hidden(self.source, layer, 0)
        batch = ReadoutBatch(hidden, self.last, self.head, self.token)
        logits = self.readout.logits(batch, layer, self.offset).float()
        first = first_max(logits)
        log_q, kl, _ = divergences(self.reference, logits, first)
        q = log_q.exp()
        top = q.topk(min(TOP, q.shape[-1]), dim=-1)
        entropy = -(q * log_q).masked_fill_(q == 0, 0.0).sum(-1)
        undefined = ~is_distribution(logits, first)
        ids = top.indices.masked_fill(undefined[:, None], -1)
        kl = kl.masked_fill(undefined | ~self.reference.defined, math.nan)
        return tuple(value.numpy() for value in (ids, top.values, entropy, kl))

    def _hidden(self, cache: "ActivationCache", layer: int, shift: int) -> "torch.Tensor":
        import torch

        start = self.first + shift
        # A copy: rows read through a memory map may be read-only.
        return torch.from_numpy(np.array(cache.residual_array(layer)[start : start + self.count]))


def _layers_of(readout: Readout, offset: int) -> tuple[int, ...]:
    return tuple(sorted({la for la, n in readout.pairs() if la is not None and n == offset}))


def _passage(cache: "ActivationCache", split: str, tokens: int) -> int:
    """The first sequence of `split` with that many tokens, else its longest."""
    numbers = cache.sequences(split)
    if not len(numbers):
        raise UsageError(f"the {split} split of this cache is empty")
    lengths = cache.sequence_length[numbers]
    enough = np.flatnonzero(lengths >= tokens)
    return int(numbers[enough[0] if len(enough) else np.argmax(lengths)])


class TokenNames:
    """Readable names of token ids: `␣` for a space, `\\n` for a line break, `#7` if unknown.

    Different texts have different names.
    """

    def __init__(self, cache: "ActivationCache") -> None:
        has = (cache.path / "head" / "tokenizer.json").is_file()
        self.tokenizer: Any = cache.tokenizer() if has else None

    def __call__(self, token: int) -> str:
        if token < 0:
            return UNDEFINED
        text = token_text(self.tokenizer, token) if self.tokenizer else None
        if text is not None and "\ufffd" in text:
            text = byte_text(self.tokenizer.id_to_token(int(token))) or text
        return f"#{int(token)}" if text is None else visible(text)


def visible(text: str) -> str:
    """A label that no other text has: spaces as `␣`, what cannot be seen and `\\` escaped.

    Joiners inside a word (U+200C in Persian, U+200D in emoji) stay as they are. Bytes that are no
    character, see `byte_text`, are `\\<E2>`.
    """
    last = len(text) - 1
    return "".join(
        letter if letter in JOINERS and 0 < place < last else _visible_letter(letter)
        for place, letter in enumerate(text)
    )


def _visible_letter(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\<{ord(letter) - 0xDC00:02X}>"
    if letter == " ":
        return "␣"
    if letter in "\\␣" or not letter.isprintable():
        return letter.encode("unicode_escape").decode()
    return letter
