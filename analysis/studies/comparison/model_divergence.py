"""Divergence of the distributions of two models at the same tokens, layer by layer.

`measure_divergence` reads both caches block by block: the models' own distributions, and those of
a lens of each at pairs of layers of equal relative depth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....cache.devices import TileRows, choose_device, copy_to_device, copy_to_host
from ....cache.progress import Auto, Progress, show_stage
from ....probes.base.readout import Readout, ReadoutBatch
from ...evaluation.distributions import top_token
from ...evaluation.pair_tiles import default_tile_rows
from ...evaluation.windows import default_window_rows
from .joined_sequences import JoinedSample

if TYPE_CHECKING:
    import torch

    from ....cache.head.head import TorchHead
    from ....cache.store.activation_cache import ActivationCache

TOP = 5
"""Likeliest tokens that are kept of each model."""


class LayerPair(NamedTuple):
    """A layer of each model, at equal relative depth as far as there is one."""

    first: int
    other: int
    depth: float
    """Relative depth l / L of the first model's layer."""


@dataclass(frozen=True, eq=False)
class LensDivergence:
    """What a lens of each model says at each pair of layers; arrays are `(n, pairs)`."""

    pairs: tuple[LayerPair, ...]
    """Ascending by depth; the last pair is that of the models themselves."""
    js: np.ndarray
    """Jensen-Shannon divergence in nats, float32; NaN where one is no distribution."""
    differs: np.ndarray
    """Whether the top tokens differ, float32; NaN where undefined."""


@dataclass(frozen=True, eq=False)
class ModelDivergence:
    """How the distributions of two models differ at n positions; nats."""

    kl: np.ndarray
    """KL(first || other), `(n,)` float32; NaN where one is no distribution."""
    reverse: np.ndarray
    """KL(other || first)."""
    js: np.ndarray
    """Jensen-Shannon divergence, at most ln 2."""
    differs: np.ndarray
    """1 where the top tokens differ, else 0."""
    top: tuple[np.ndarray, np.ndarray]
    """Likeliest tokens of each model, `(n, TOP)` int64."""
    p_top: tuple[np.ndarray, np.ndarray]
    """Their probabilities, `(n, TOP)` float32."""
    cross_entropy: tuple[np.ndarray, np.ndarray]
    """-log p of the text's next token under each model; NaN where the text ends."""
    equal_states: dict[LayerPair, np.ndarray]
    """Whether the residual streams are equal bit for bit, `(n,)` bool; empty for other widths."""
    lenses: dict[str, LensDivergence]


def pair_layers(
    first: "ActivationCache", other: "ActivationCache", layers: Sequence[tuple[int, ...]]
) -> tuple[LayerPair, ...]:
    """Pairs of layers, each of the first model's below its last with the nearest of the other's.

    `layers` are those that can be read of each model. The last pair is that of the last layers.
    """
    depths = first.n_blocks, other.n_blocks
    below = [
        [layer for layer in of_model if layer < depths[k]] for k, of_model in enumerate(layers)
    ]
    pairs = []
    for layer in below[0] if below[1] else []:
        depth = layer / depths[0]
        nearest = min(below[1], key=lambda found: (abs(found / depths[1] - depth), found))
        pairs.append(LayerPair(layer, nearest, depth))
    return (*pairs, LayerPair(*depths, 1.0))


def measure_divergence(
    sample: JoinedSample,
    lenses: Mapping[str, tuple[Readout, Readout]],
    pairs_of_lens: Mapping[str, tuple[LayerPair, ...]],
    *,
    device: "str | torch.device" = "auto",
    progress: Progress | Auto | None = "auto",
) -> ModelDivergence:
    """Compare both models and their lenses, a pair of lenses for each name, at offset 0."""
    import torch

    reader = _DivergenceReader(sample, lenses, pairs_of_lens, choose_device(device))
    count = sample.first.count
    tiles = TileRows(default_window_rows(sample.first.cache.vocab, reader.device), reader.device)
    with show_stage(progress, "divergence") as report, torch.no_grad():

        def read(rows: slice) -> None:
            reader.read_block(rows)
            if report is not None:
                report(rows.stop, count)

        tiles.run(count, read)
    return reader.result


@dataclass(eq=False)
class _DivergenceReader:
    """Reads blocks of joined positions and writes what it measures to `result`."""

    sample: JoinedSample
    lenses: Mapping[str, tuple[Readout, Readout]]
    pairs: Mapping[str, tuple[LayerPair, ...]]
    device: "torch.device"
    result: ModelDivergence = field(init=False)
    heads: "tuple[TorchHead, TorchHead]" = field(init=False)

    def __post_init__(self) -> None:
        caches = self.caches
        n, top = self.sample.first.count, min(TOP, caches[0].vocab)

        def empty(*shape: int) -> np.ndarray:
            return np.full((n, *shape), np.nan, np.float32)

        same_width = caches[0].d_model == caches[1].d_model
        all_pairs = dict.fromkeys(pair for pairs in self.pairs.values() for pair in pairs)
        self.heads = caches[0].head.torch(self.device), caches[1].head.torch(self.device)
        self.result = ModelDivergence(
            kl=empty(),
            reverse=empty(),
            js=empty(),
            differs=empty(),
            top=(np.full((n, top), -1, np.int64), np.full((n, top), -1, np.int64)),
            p_top=(empty(top), empty(top)),
            cross_entropy=(empty(), empty()),
            equal_states={pair: np.zeros(n, bool) for pair in all_pairs if same_width},
            lenses={
                name: LensDivergence(pairs, empty(len(pairs)), empty(len(pairs)))
                for name, pairs in self.pairs.items()
            },
        )

    @property
    def caches(self) -> "tuple[ActivationCache, ActivationCache]":
        return self.sample.first.cache, self.sample.other.cache

    def read_block(self, rows: slice) -> None:
        """Measure the joined positions `rows`."""
        import torch

        result, caches = self.result, self.caches
        positions = self.sample.first.positions[rows], self.sample.other_positions[rows]
        text = copy_to_device(torch.from_numpy(self.sample.first.text_tokens[rows]), self.device)

        # The models themselves.
        last = LayerPair(caches[0].n_blocks, caches[1].n_blocks, 1.0)
        states = [
            self._states(k, layer, positions[k]) for k, layer in enumerate((last.first, last.other))
        ]
        logits = [head(hidden) for head, hidden in zip(self.heads, states, strict=True)]
        found = compare_logits(logits[0], logits[1], len(result.top[0][0]), text)
        for name in ("kl", "reverse", "js", "differs"):
            getattr(result, name)[rows] = copy_to_host(found[name]).numpy()
        for k in (0, 1):
            result.top[k][rows] = copy_to_host(found[f"top {k}"]).numpy()
            result.p_top[k][rows] = copy_to_host(found[f"p {k}"]).numpy()
            result.cross_entropy[k][rows] = copy_to_host(found[f"nll {k}"]).numpy()
        self._compare_states(rows, last, states)
        for lens in result.lenses.values():
            lens.js[rows, -1], lens.differs[rows, -1] = result.js[rows], result.differs[rows]

        # A lens of each model at the layers below; states are read once for all lenses.
        for pair in dict.fromkeys(pair for pairs in self.pairs.values() for pair in pairs[:-1]):
            states = [
                self._states(k, layer, positions[k])
                for k, layer in enumerate((pair.first, pair.other))
            ]
            self._compare_states(rows, pair, states)
            for name, of_lens in result.lenses.items():
                if pair not in of_lens.pairs:
                    continue
                # Each model has a head of its own, and so buffers of its own.
                both = [
                    self._lens_logits(name, k, layer, states[k], positions[k])
                    for k, layer in enumerate((pair.first, pair.other))
                ]
                compared = compare_logits(both[0], both[1])
                column = of_lens.pairs.index(pair)
                of_lens.js[rows, column] = copy_to_host(compared["js"]).numpy()
                of_lens.differs[rows, column] = copy_to_host(compared["differs"]).numpy()

    def _compare_states(
        self, rows: slice, pair: LayerPair, states: "Sequence[torch.Tensor]"
    ) -> None:
        """Write whether the states of both models are equal."""
        if pair in self.result.equal_states:
            equal = (states[0] == states[1]).all(-1)
            self.result.equal_states[pair][rows] = copy_to_host(equal).numpy()

    def _states(self, model: int, layer: int, positions: np.ndarray) -> "torch.Tensor":
        """Residual stream of a model at `positions`, `(n, d_model)` float32."""
        import torch

        rows = np.asarray(self.caches[model].residual_array(layer).take(positions), np.float32)
        return copy_to_device(torch.from_numpy(rows), self.device)

    def _lens_logits(
        self, name: str, model: int, layer: int, hidden: "torch.Tensor", positions: np.ndarray
    ) -> "torch.Tensor":
        """Logits of a model's lens at offset 0, `(n, vocab)` float32."""
        import torch

        cache, lens = self.caches[model], self.lenses[name][model]
        view = getattr(lens, "view", None)
        if view is not None:
            rows = np.asarray(view(cache).residual_array(layer)[positions], np.float32)
            hidden = copy_to_device(torch.from_numpy(rows), self.device)
        token, position = (
            copy_to_device(torch.from_numpy(np.asarray(values, np.int64)), self.device)
            for values in (cache.tokens.take(positions), positions)
        )
        batch = ReadoutBatch(
            hidden=hidden,
            last_token=token,
            head=self.heads[model],
            token=token,
            position=position,
        )
        return lens.logits(batch, layer, 0).float()


def compare_logits(
    first: "torch.Tensor",
    other: "torch.Tensor",
    top: int = 0,
    text: "torch.Tensor | None" = None,
) -> "dict[str, torch.Tensor]":
    """Divergences of rows of logits `(n, vocab)`: `kl`, `reverse`, `js`, `differs`, `(n,)`.

    With `top`, also `top 0`, `p 0`, `top 1`, `p 1` `(n, top)`, the likeliest tokens of each; with
    `text`, `nll 0` and `nll 1`, -log p of these tokens, NaN where the token is -1. Equal rows have
    divergences of exactly 0; rows that are no distribution have NaN.
    """
    import torch
    from torch.nn.functional import softplus

    n, tile_rows = len(first), default_tile_rows(first.shape[-1], first.device)
    names = ("kl", "reverse", "js")
    found = {name: first.new_full((n,), float("nan")) for name in names}
    log_two = softplus(first.new_zeros(()))
    tokens = top_token(first), top_token(other)
    defined = torch.ones(n, dtype=torch.bool, device=first.device)
    for logits, token in zip((first, other), tokens, strict=True):
        defined &= logits.gather(-1, token[:, None])[:, 0].isfinite()
    for start in range(0, n, tile_rows):
        tile = slice(start, start + tile_rows)
        log_p, log_q = first[tile].log_softmax(-1), other[tile].log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        # A token without mass adds nothing, also where the other side excludes it.
        difference = torch.where(log_p == log_q, 0.0, log_p - log_q)
        sums = {
            "kl": torch.where(p > 0, p * difference, 0.0),
            "reverse": torch.where(q > 0, -q * difference, 0.0),
            # log(p / m) = log 2 - log(1 + q / p), exact where p = q.
            "js": torch.where(p > 0, p * (log_two - softplus(-difference)), 0.0)
            + torch.where(q > 0, q * (log_two - softplus(difference)), 0.0),
        }
        for name, products in sums.items():
            found[name][tile] = products.sum(-1).clamp_min(0.0)
        if top:
            for k, probabilities in enumerate((p, q)):
                values, ids = probabilities.topk(top, -1)
                for name, part in ((f"p {k}", values), (f"top {k}", ids)):
                    found.setdefault(name, part.new_empty(n, top))[tile] = part
        if text is not None:
            for k, log_values in enumerate((log_p, log_q)):
                nll = -log_values.gather(-1, text[tile].clamp_min(0)[:, None])[:, 0]
                nll = nll.masked_fill(text[tile] < 0, float("nan"))
                found.setdefault(f"nll {k}", nll.new_empty(n))[tile] = nll
    found["js"] = found["js"] / 2
    found["differs"] = (tokens[0] != tokens[1]).to(first.dtype)
    for name in ("kl", "reverse", "js", "differs"):
        found[name] = found[name].masked_fill(~defined, float("nan"))
    return found
