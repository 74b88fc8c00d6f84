"""One cell of a lens map in detail, and lens maps as plain values for JSON.

`read_lens_cell` gives the likeliest tokens of one layer at one token, beside the model's own;
`plain_lens_map` the cells of a `LensMap` (lens_maps.py).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.devices import choose_device
from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_files import plain_value
from ...probes.base.readout import Readout, ReadoutBatch
from ...probes.saved.save import check_belongs
from .lens_maps import MEASURES, CachePassage, LensMap, streams_of_cache, token_to_track

if TYPE_CHECKING:
    import torch

    from .own_text import PassageStreams

MAX_TOP = 100
"""Most tokens of a cell."""


@dataclass(frozen=True)
class TokenProbability:
    """A token in a distribution over the vocabulary."""

    token: int
    """Token id."""
    label: str
    """Printable text of the token."""
    probability: float
    rank: int
    """1 is the likeliest; ties go to the lower id."""


@dataclass(frozen=True)
class LensCell:
    """What a lens and the model say at one layer and one token of a passage."""

    lens: str
    layer: int
    offset: int
    sequence: int
    index: int
    """Index of the token t in its sequence."""
    token: str
    """Label of the token t that the model read."""
    top: tuple[TokenProbability, ...]
    """The lens's likeliest tokens, the likeliest first; empty where logits are no distribution."""
    model_top: tuple[TokenProbability, ...]
    """The model's own likeliest tokens at t+offset."""
    tracked: TokenProbability | None
    """The tracked token in the lens's distribution; None without one."""
    entropy: float
    """Of the lens's distribution, in nats."""
    kl: float
    """KL(model || lens), in nats."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON; None for undefined numbers."""
        return plain_value(asdict(self))


def read_lens_cell(
    lens: Readout,
    passage: CachePassage,
    *,
    layer: int,
    offset: int = 0,
    count: int = 10,
    track: str | int | None = None,
    name: str | None = None,
    device: "str | torch.device" = "auto",
) -> LensCell:
    """The `count` likeliest tokens of `lens` at the first token of `passage`, and the model's.

    `track` is a token whose probability and rank are given, too. Raises `UsageError` for a passage
    outside its sequence or without a token `offset` further in its document, `NotFoundError` for a
    layer or an offset that the lens lacks, `MismatchError` for a lens of another model.
    """
    import torch

    if passage.sequence is None:
        raise UsageError("a cell lies in a sequence: name its number")
    if not 1 <= count <= MAX_TOP:
        raise UsageError(f"count must lie in 1-{MAX_TOP}, not {count}")
    if (layer, offset) not in lens.pairs():
        raise NotFoundError(f"{name or lens.kind} does not read layer {layer} at offset {offset}")
    place = CachePassage(passage.cache, passage.sequence, passage.start, 1)
    streams = streams_of_cache(place, offset, choose_device(device))
    owner: Any = streams
    check_belongs(lens, owner, False)
    streams.count(offset)  # raises where the document ends before

    ids = torch.from_numpy(streams.tokens).to(streams.device)
    # The tokens that a lens may read: those at t and up to t+offset, and the one before the last.
    before = ids[offset - 1 : offset] if offset else ids.new_tensor([_token_before(passage)])
    batch = ReadoutBatch(
        hidden=streams.hidden(lens, layer)[:1],
        last_token=ids[offset : offset + 1],
        head=streams.torch_head,
        token=ids[:1],
        previous_token=before,
    )
    with torch.no_grad():
        logits = lens.logits(batch, layer, offset).double()
        if tuple(logits.shape) != (1, streams.vocab):
            raise UsageError(f"{name or lens.kind} does not predict tokens: it has no such cell")
        log_q = logits[0].log_softmax(-1)
        log_p = streams.model_logits[offset].log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum().clamp_min(0.0)
        entropy = -torch.where(q > 0, q * log_q, 0.0).sum()
    tracked = None if track is None else token_to_track(track, streams)
    return LensCell(
        lens=name or str(lens.kind),
        layer=layer,
        offset=offset,
        sequence=passage.sequence,
        index=passage.start,
        token=streams.names(int(streams.tokens[0])),
        top=_likeliest(q, count, streams),
        model_top=_likeliest(p, count, streams),
        tracked=None if tracked is None else _token_in(q, tracked, streams),
        entropy=float(entropy),
        kl=float(kl),
    )


def _token_before(passage: CachePassage) -> int:
    """The token before the passage in its sequence; -1 at the start of it."""
    first = int(passage.cache.sequence_start[passage.sequence]) + passage.start
    return int(passage.cache.tokens[first - 1 : first][0]) if passage.start else -1


def _likeliest(
    q: "torch.Tensor", count: int, streams: "PassageStreams"
) -> tuple[TokenProbability, ...]:
    """The `count` likeliest tokens of a distribution `(vocab,)`; ties go to the lower id."""
    import torch

    if not bool(torch.isfinite(q).all()):
        return ()
    order = torch.argsort(q, descending=True, stable=True)[:count].tolist()
    return tuple(
        TokenProbability(token, streams.names(token), float(q[token]), rank)
        for rank, token in enumerate(order, 1)
    )


def _token_in(q: "torch.Tensor", token: int, streams: "PassageStreams") -> TokenProbability | None:
    """One token of a distribution `(vocab,)`; None where it is no distribution."""
    import torch

    if not bool(torch.isfinite(q).all()):
        return None
    rank = 1 + int((q > q[token]).sum()) + int((q[:token] == q[token]).sum())
    return TokenProbability(token, streams.names(token), float(q[token]), rank)


def plain_lens_map(entry: LensMap, digits: int = 5) -> dict[str, Any]:
    """A `LensMap` as a JSON object: measures rounded to `digits` significant digits.

    Lists are by layer, low to high, then by token; None stands for undefined numbers.
    """
    return {
        "lens": str(entry.lens),
        "offset": entry.offset,
        "layers": list(entry.layers),
        "tokens": list(entry.tokens),
        "targets": list(entry.targets),
        "top": [[list(labels) for labels in row] for row in entry.top],
        "agrees": entry.agrees.tolist(),
        "values": {name: _rounded(entry.values[name], digits) for name in MEASURES},
    }


def _rounded(values: np.ndarray, digits: int) -> list[list[float | None]]:
    """Numbers with `digits` significant digits; None for NaN and infinity."""
    return [
        [float(f"{x:.{digits}g}") if np.isfinite(x) else None for x in row]
        for row in values.tolist()
    ]
