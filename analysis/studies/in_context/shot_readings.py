"""Whether readouts have the text's token on top, N tokens ahead, at the answers of `data icl`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import copy_to_device
from ....cache.errors import UsageError
from ....cache.tokens.segments import neighbour_tokens, segment_indices
from ....probes.base.readout import Readout, ReadoutBatch
from ....probes.base.resampling import ResamplingUnits
from ...evaluation.window_tally import check_logits_shape

if TYPE_CHECKING:
    import torch

    from ....cache.head.head import TorchHead
    from ....cache.store.activation_cache import ActivationCache

BLOCK_BYTES = 64 << 20
"""Size of a float32 matrix of logits, `(rows, vocab)`."""
LensLayer = tuple[str, int | None]
"""Name and layer of a readout."""


@dataclass(frozen=True, eq=False)
class ShotSample:
    """All positions of some sequences; arrays are `(n,)`, in the order of the cache."""

    cache: "ActivationCache"
    sequences: np.ndarray
    seed: int = 0

    @cached_property
    def positions(self) -> np.ndarray:
        """Positions in the cache, int64."""
        return self.cache.positions_of(self.sequences)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token that the model read at each position, int64."""
        return np.asarray(self.cache.tokens[self.positions], np.int64)

    @cached_property
    def next_tokens(self) -> np.ndarray:
        """Next token of the text, -1 at its end, int64."""
        return neighbour_tokens(self.cache, self.positions, 1)

    @cached_property
    def previous_tokens(self) -> np.ndarray:
        """Token before each position, -1 at the start, int64."""
        return neighbour_tokens(self.cache, self.positions, -1)

    @cached_property
    def sequence_rows(self) -> np.ndarray:
        """Index in `sequences` of each position, int64."""
        lengths = self.cache.sequence_length[self.sequences]
        return np.repeat(np.arange(len(self.sequences)), lengths)

    @cached_property
    def _indices(self) -> tuple[np.ndarray, np.ndarray]:
        """Index of each position among the kept ones of its text, and how many follow there."""
        return segment_indices(self.cache, self.sequences)

    @cached_property
    def units(self) -> ResamplingUnits:
        """The documents, which intervals resample."""
        return ResamplingUnits.of(self.cache, self.sequences, self.seed)

    def sources(self, offset: int) -> np.ndarray:
        """Indices i of the pairs (i, i + `offset`) that have a next token, ascending, int64."""
        sources = np.flatnonzero(self._indices[1] >= offset)
        return sources[self.next_tokens[sources + offset] >= 0]

    def sequence_label(self, name: str) -> np.ndarray:
        """The label `name` of the sequence of each position."""
        return np.asarray(self.cache.label(name))[self.sequences][self.sequence_rows]

    def is_inside(self, offset: int, sources: np.ndarray) -> np.ndarray:
        """Whether the token after each source + `offset` is in the part that shots determine.

        By the label `known_until` (a character of the text) or `horizon` (tokens of the answer
        from its first one); bool `(sources,)`. Raises `UsageError` for a cache with neither.
        """
        labels, targets = self.cache.label_names, sources + offset
        if "known_until" in labels and self.cache.has("tokens/char_stop"):
            # The target begins where the token before it ends.
            start = self.cache.spans(self.positions[targets])[:, 2]
            return start < self.sequence_label("known_until")[targets]
        if "horizon" in labels:
            return self._indices[0][targets] < self.sequence_label("horizon")[targets]
        raise UsageError(
            "this cache has no label known_until (with characters) or horizon: which tokens follow "
            "from the context is not known; make the texts with `residua data icl`"
        )


def measure_hits(
    sample: ShotSample,
    readouts: Mapping[str, Readout],
    offsets: Sequence[int],
    device: "torch.device",
    progress: Callable[[int, int], object] | None = None,
) -> dict[tuple[str, int | None, int], np.ndarray]:
    """Whether each readout has the text's token on top: (name, layer, N) -> `(pairs,)` bool.

    Pairs are those of `sample.sources(N)`. Of equal logits the smallest id is on top; a row whose
    logits are not finite is no hit. States are read once for each layer and view.
    """
    import torch

    cache = sample.cache
    wanted: dict[LensLayer, list[int]] = {}
    for name, readout in readouts.items():
        for layer, offset in readout.pairs():
            if offset in offsets and (layer is None or layer in cache.layers):
                wanted.setdefault((name, layer), []).append(offset)
    sources = {offset: sample.sources(offset) for offset in offsets}
    head = cache.head.torch(device)
    rows = max(1, BLOCK_BYTES // (4 * cache.vocab))
    hits: dict[tuple[str, int | None, int], np.ndarray] = {}
    with torch.no_grad():
        for number, ((name, layer), of_readout) in enumerate(wanted.items()):
            readout = readouts[name]
            view = getattr(readout, "view", None)
            array = None
            if layer is not None:
                array = (cache if view is None else view(cache)).residual_array(layer)
            for offset in sorted(of_readout):
                found = np.zeros(len(sources[offset]), bool)
                for start in range(0, len(found), rows):
                    part = slice(start, start + rows)
                    batch = _batch(sample, sources[offset][part], offset, array, head, device)
                    logits = readout.logits(batch, layer, offset)
                    check_logits_shape(logits, name, (len(batch.last_token), cache.vocab))
                    targets = sample.next_tokens[sources[offset][part] + offset]
                    found[part] = _is_on_top(logits, targets)
                hits[name, layer, offset] = found
            if progress is not None:
                progress(number + 1, len(wanted))
    return hits


def _batch(
    sample: ShotSample,
    sources: np.ndarray,
    offset: int,
    array: "object | None",
    head: "TorchHead",
    device: "torch.device",
) -> ReadoutBatch:
    """What a readout is given for the pairs (i, i + `offset`) of `sources` `(n,)`."""
    import torch

    def on_device(values: np.ndarray) -> "torch.Tensor":
        return copy_to_device(torch.from_numpy(np.ascontiguousarray(values)), device)

    hidden = None
    if array is not None:
        hidden = on_device(np.array(array[sample.positions[sources]], np.float32))  # type: ignore[index]
    targets = sources + offset
    return ReadoutBatch(
        hidden=hidden,
        last_token=on_device(sample.tokens[targets]),
        head=head,
        token=on_device(sample.tokens[sources]),
        previous_token=on_device(sample.previous_tokens[targets]),
        position=on_device(sample.positions[targets]),
    )


def _is_on_top(logits: "torch.Tensor", tokens: np.ndarray) -> np.ndarray:
    """Whether `tokens` `(n,)` have the largest of `logits` `(n, vocab)`, the first on ties."""
    import torch

    ids = torch.from_numpy(tokens).to(logits.device)[:, None]
    own = logits.gather(1, ids)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    beaten = (logits > own) | ((logits == own) & (numbers < ids)) | logits.isnan()
    return (~beaten.any(1) & own[:, 0].isfinite()).cpu().numpy()
