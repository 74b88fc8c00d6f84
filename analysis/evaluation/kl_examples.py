"""The pairs at which a lens is farthest from the model and nearest to it, with their text.

`Evaluation.kl_examples` chooses lenses and layers; analysis/report/example_tables.py shows them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...cache.devices import TileRows, choose_device, copy_to_device, copy_to_host
from ...cache.errors import NotFoundError
from ...cache.tokens.segments import PairScope, segment_indices
from ...probes.base.readout import Readout, ReadoutBatch
from ..token_texts.token_names import TokenNames
from .windows import EvaluationSample, EvaluationWindow, choose_sequences, evaluation_windows

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

SEARCHED_POSITIONS = 2048
"""Positions of whole sequences among which examples are searched."""
CONTEXT_TOKENS = 16
"""Most tokens of text before and with the token t of an example."""
LIKELIEST = 3
"""Likeliest tokens that are shown of the model and of the lens."""
COUNT = 5
"""Examples at each end."""


@dataclass(frozen=True)
class KlExample:
    """One pair (t, t+N): the text that the model read, and what model and lens say after it."""

    sequence: int
    """Number of the sequence in the cache."""
    index: int
    """Index of t+N in its sequence."""
    kl: float
    """KL(model || lens) in nats."""
    context: str
    """Printable text up to t+N, within its document; the last N tokens are in `ahead`."""
    ahead: str
    """Printable text of the N tokens after t, which the lens did not see; empty at N = 0."""
    model: tuple[tuple[str, float], ...]
    """The model's likeliest tokens, as labels with their probabilities."""
    lens: tuple[tuple[str, float], ...]
    """The lens's likeliest tokens, likewise."""


@dataclass(frozen=True)
class KlExamples:
    """Examples of one lens at one layer and offset."""

    probe: str
    """Name of the lens."""
    layer: int
    offset: int
    n: int
    """Pairs that were searched, without those whose distributions are undefined."""
    worst: tuple[KlExample, ...]
    """Largest KL first, at most one per sequence."""
    best: tuple[KlExample, ...]
    """Smallest KL first, at most one per sequence."""


def find_kl_examples(
    cache: "ActivationCache",
    readout: Readout,
    *,
    layer: int,
    offset: int,
    split: str = "test",
    seed: int = 0,
    scope: PairScope | None = None,
    where: np.ndarray | None = None,
    name: str | None = None,
    count: int = COUNT,
    device: "str | torch.device" = "auto",
) -> KlExamples:
    """The `count` pairs with the largest KL, and those with the smallest, of `readout` at `layer`.

    Searched are sequences of `split` drawn by `seed`, up to `SEARCHED_POSITIONS` positions. At most
    one pair of a sequence is given. `name` is that of the lens in tables (default: its kind).
    Raises `NotFoundError` if the readout has no such layer and offset.
    """
    if (layer, offset) not in readout.pairs():
        raise NotFoundError(f"the {readout.kind} readout has no layer {layer} at offset {offset}")
    sequences = choose_sequences(cache, split, SEARCHED_POSITIONS, seed)
    sample = EvaluationSample(cache, sequences, scope or PairScope(), where)
    view = getattr(readout, "view", None)
    reader = _PairReader(
        cache, view(cache) if view else cache, readout, layer, offset, choose_device(device)
    )
    pairs = reader.read_all(sample)
    if pairs is None:
        return KlExamples(name or readout.kind, layer, offset, 0, (), ())
    names = TokenNames(cache)
    return KlExamples(
        probe=name or readout.kind,
        layer=layer,
        offset=offset,
        n=len(pairs.kl),
        worst=_choose(cache, names, pairs, np.argsort(-pairs.kl, kind="stable"), offset, count),
        best=_choose(cache, names, pairs, np.argsort(pairs.kl, kind="stable"), offset, count),
    )


class _Pairs(NamedTuple):
    """What model and lens say at the searched pairs with defined distributions."""

    target: np.ndarray
    """Position t+N in the cache, `(n,)`."""
    kl: np.ndarray
    """KL(model || lens) in nats, `(n,)`."""
    ids: np.ndarray
    """Likeliest tokens of model and lens, `(n, 2, likeliest)`."""
    probability: np.ndarray
    """Their probabilities, `(n, 2, likeliest)`."""


class _PairReader:
    """Compares one readout with the model, window by window, on one device."""

    def __init__(
        self,
        cache: "ActivationCache",
        source: "ActivationCache",
        readout: Readout,
        layer: int,
        offset: int,
        device: "torch.device",
    ) -> None:
        self.cache, self.source, self.readout = cache, source, readout
        self.layer, self.offset, self.device = layer, offset, device
        self.head = cache.head.torch(device)
        self._found: list[tuple[np.ndarray, ...]] = []

    def read_all(self, sample: EvaluationSample) -> _Pairs | None:
        """All pairs of `sample`, None without any; what does not fit into memory is halved."""
        import torch

        tiles = TileRows(SEARCHED_POSITIONS, self.device)
        with torch.no_grad():
            for window in evaluation_windows(sample, (self.offset,), device=self.device):

                def read(targets: slice, window: EvaluationWindow = window) -> None:
                    self._found.append(self._read(window.part(targets, (self.offset,))))

                tiles.run(window.stop - window.start, read)
        if not self._found:
            return None
        return _Pairs(*(np.concatenate(arrays) for arrays in zip(*self._found, strict=True)))

    def _read(self, window: EvaluationWindow) -> tuple[np.ndarray, ...]:
        """Targets, KL, likeliest tokens and probabilities of the pairs of `window`."""
        import torch

        targets = window.targets(self.offset)
        sources = window.sources(targets, self.offset)
        positions = window.positions[window.target_rows[targets]]
        batch = ReadoutBatch(
            hidden=self._states(self.source, self.layer, window.positions[sources]),
            last_token=copy_to_device(window.target_token[targets], self.device),
            head=self.head,
            token=copy_to_device(window.token[sources], self.device),
            previous_token=copy_to_device(window.previous_token[targets], self.device),
            position=copy_to_device(torch.from_numpy(positions), self.device),
        )
        model = self.head(self._states(self.cache, self.cache.n_blocks, positions))
        log_p = model.float().log_softmax(-1)
        log_q = self.readout.logits(batch, self.layer, self.offset).float().log_softmax(-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(-1).clamp_min_(0.0)
        likeliest = [
            distribution.exp().topk(min(LIKELIEST, distribution.shape[-1]), dim=-1)
            for distribution in (log_p, log_q)
        ]
        defined = copy_to_host(~(log_p.isnan().any(-1) | log_q.isnan().any(-1))).numpy()
        arrays = (
            kl,
            torch.stack([top.indices for top in likeliest], 1),
            torch.stack([top.values for top in likeliest], 1),
        )
        return (
            positions[defined],
            *(copy_to_host(values).numpy()[defined] for values in arrays),
        )

    def _states(self, cache: "ActivationCache", layer: int, positions: np.ndarray) -> Any:
        """Residual stream of `layer` at `positions` on the device, `(n, d_model)` float32."""
        import torch

        rows = np.array(cache.residual_array(layer)[positions])
        return copy_to_device(torch.from_numpy(rows), self.device)


def _choose(
    cache: "ActivationCache",
    names: TokenNames,
    pairs: _Pairs,
    order: np.ndarray,
    offset: int,
    count: int,
) -> tuple[KlExample, ...]:
    """The first `count` pairs in `order`, at most one of a sequence."""
    chosen: dict[int, KlExample] = {}
    sequences = np.searchsorted(cache.sequence_start, pairs.target, side="right") - 1
    for pair in order.tolist():
        if len(chosen) == count:
            break
        sequence = int(sequences[pair])
        if sequence not in chosen:
            chosen[sequence] = _example(cache, names, pairs, pair, sequence, offset)
    return tuple(chosen.values())


def _example(
    cache: "ActivationCache",
    names: TokenNames,
    pairs: _Pairs,
    pair: int,
    sequence: int,
    offset: int,
) -> KlExample:
    """Pair number `pair` of `pairs` as text."""
    target = int(pairs.target[pair])
    index = target - int(cache.sequence_start[sequence])
    # Tokens of the document before t, t itself, and the N tokens after it.
    in_document = int(segment_indices(cache, np.array([sequence]))[0][index])
    length = min(max(in_document, offset) + 1, CONTEXT_TOKENS + offset)
    tokens = cache.tokens[target + 1 - length : target + 1].tolist()
    split = length - offset

    def labelled(side: int) -> tuple[tuple[str, float], ...]:
        ids, probability = pairs.ids[pair, side], pairs.probability[pair, side]
        return tuple(
            (names(token), float(p))
            for token, p in zip(ids.tolist(), probability.tolist(), strict=True)
        )

    return KlExample(
        sequence=sequence,
        index=index,
        kl=float(pairs.kl[pair]),
        context=names.passage(tokens[:split]),
        ahead=names.passage(tokens[split:]),
        model=labelled(0),
        lens=labelled(1),
    )
