"""What lenses say at every layer of sampled positions: the prediction trajectories of 2303.08112.

`measure_trajectories` reads each row of each layer once, for all lenses, and computes the model's
own distribution once for all of them. Studies of lens quality, prediction depth, anomalies and of
two models share its readings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.devices import TileRows, choose_device, copy_to_device, copy_to_host
from ....cache.errors import NotFoundError, UsageError
from ....cache.number_ranges import as_tuple, format_ranges
from ....cache.progress import Auto, Progress, show_stage
from ....probes.base.readout import Readout, ReadoutBatch
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.comparison import Comparison, compare_pairs
from ...evaluation.distributions import MeasureBuffers, Reference, value_at
from ...evaluation.pair_tiles import default_tile_rows
from ...evaluation.window_tally import check_logits_shape
from ...evaluation.windows import default_window_rows
from .position_sample import PositionSample

if TYPE_CHECKING:
    import torch

    from ....cache.head.head import TorchHead

MEASURES = (
    "entropy",
    "kl",
    "js",
    "total_variation",
    "cross_entropy",
    "max_probability",
    "rank",
    "text_rank",
    "log_p_final",
    "surprisal",
)
"""All measures, in nats where they have a unit:

- `entropy` of the lens's distribution q;
- `kl`: KL(p || q) from the model's distribution p;
- `js`: Jensen-Shannon divergence of p and q, at most ln 2;
- `total_variation`: half of the sum of |p - q|;
- `cross_entropy`: -log q of the text's next token; NaN where the text ends;
- `max_probability` of q;
- `rank` of the model's top token in q, 1 for the first; `text_rank` that of the text's next token;
- `log_p_final`: log q of the model's top token;
- `surprisal`: -log p of the lens's top token.
"""
TRACKED = ("tracked_log_p", "tracked_rank")
"""Measures of a tracked token: log q and its rank."""
_OF_VOCABULARY = ("entropy", "js", "total_variation", "max_probability")
"""Measures that take passes over the vocabulary of their own."""
_OF_LENS_ALONE = ("entropy", "max_probability", "cross_entropy", "text_rank", *TRACKED)
"""Measures that need no distribution of the model."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What one lens says at each layer of each position of a sample."""

    lens: str
    layers: tuple[int, ...]
    """Ascending; the last one is the model itself, for every lens."""
    values: dict[str, np.ndarray]
    """Measure -> `(n, layers)` float32; NaN where the lens's or the model's logits, which the
    measure needs, are no distribution."""
    top: np.ndarray
    """Top token, the lowest id on ties, `(n, layers)` int64; -1 where undefined."""
    marginal: np.ndarray | None = None
    """Mean distribution over the positions where both are defined, `(layers, vocab)` float64."""

    @property
    def undefined(self) -> int:
        """Number of readings whose logits are no distribution."""
        return int((self.top < 0).sum())

    def column(self, layer: int) -> int:
        """Column of `layer`; raises `NotFoundError` for one that the lens does not read."""
        if layer not in self.layers:
            raise NotFoundError(
                f"{self.lens} does not read layer {layer} (it reads {format_ranges(self.layers)})"
            )
        return self.layers.index(layer)


def measure_trajectories(
    sample: PositionSample,
    lenses: Mapping[str, Readout],
    *,
    measures: Iterable[str] = MEASURES,
    layers: int | Iterable[int] | None = None,
    tracked: int | None = None,
    marginals: bool = False,
    device: "str | torch.device" = "auto",
    progress: Progress | Auto | None = "auto",
) -> dict[str, Trajectories]:
    """Read `sample` with all `lenses` at offset 0, in one pass over the rows.

    `layers` limits the layers (the last one is always read); `tracked` is a token id whose log q
    and rank are measured, too. Softmax in float32. Raises `UsageError` for an unknown measure,
    `NotFoundError` for a lens without any of the layers at offset 0.
    """
    wanted = tuple(name for name in MEASURES if name in (chosen := set(measures)))
    if unknown := sorted(chosen - set(MEASURES)):
        raise UsageError(f"there is no measure {unknown[0]!r}; measures are {', '.join(MEASURES)}")
    cache, torch_device = sample.cache, choose_device(device)
    if tracked is not None and not 0 <= tracked < cache.vocab:
        raise UsageError(f"there is no token {tracked} in a vocabulary of {cache.vocab}")
    reader = _Reader(
        sample,
        {
            name: _Readings(sample, name, lens, _lens_layers(sample, name, lens, layers))
            for name, lens in lenses.items()
        },
        wanted,
        tracked,
        marginals,
        torch_device,
    )
    with show_stage(progress, "trajectories") as report:
        reader.read_all(report)
    return {name: readings.result() for name, readings in reader.readings.items()}


def _lens_layers(
    sample: PositionSample, name: str, lens: Readout, layers: int | Iterable[int] | None
) -> tuple[int, ...]:
    """Layers that `lens` reads at offset 0, ascending, and the last one."""
    cache = sample.cache
    of_lens = {layer for layer, offset in lens.pairs() if layer is not None and offset == 0}
    wanted = set(cache.layers if layers is None else as_tuple(layers))
    found = sorted((of_lens & wanted & set(cache.layers)) - {cache.n_blocks})
    if not found:
        raise NotFoundError(
            f"{name} reads none of the layers {format_ranges(sorted(wanted - {cache.n_blocks}))} "
            f"at offset 0 below the last one; the cache holds {format_ranges(cache.layers)}"
        )
    return (*found, cache.n_blocks)


@dataclass(eq=False)
class _Readings:
    """What one lens said so far."""

    sample: PositionSample
    name: str
    lens: Readout
    layers: tuple[int, ...]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    marginal: np.ndarray | None = None
    """Sum of distributions, `(layers, vocab)`."""
    marginal_count: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.top = np.full((self.sample.count, len(self.layers)), -1, np.int64)
        view = getattr(self.lens, "view", None)
        self.source = self.sample.cache if view is None else view(self.sample.cache)
        """Where the states come from: controls read other rows."""

    def write(self, rows: slice, layer: int, measured: dict[str, np.ndarray]) -> None:
        """Keep the measures `(rows,)` of one block."""
        column = self.layers.index(layer)
        self.top[rows, column] = measured.pop("top").astype(np.int64)
        for name, values in measured.items():
            if name not in self.values:
                self.values[name] = np.full(self.top.shape, np.nan, np.float32)
            self.values[name][rows, column] = values

    def add_marginal(self, layer: int, total: np.ndarray, count: int) -> None:
        """Add the sum of `count` distributions, `(vocab,)`."""
        if self.marginal is None:
            self.marginal = np.zeros((len(self.layers), len(total)))
            self.marginal_count = np.zeros(len(self.layers))
        self.marginal[self.layers.index(layer)] += total
        self.marginal_count[self.layers.index(layer)] += count

    def result(self) -> Trajectories:
        """The trajectories."""
        marginal = self.marginal
        if marginal is not None:
            with np.errstate(invalid="ignore"):
                marginal = marginal / self.marginal_count[:, None]
        return Trajectories(self.name, self.layers, self.values, self.top, marginal)


@dataclass(eq=False)
class _Reader:
    """Reads blocks of positions, layer by layer, for all lenses."""

    sample: PositionSample
    readings: dict[str, _Readings]
    measures: tuple[str, ...]
    tracked: int | None
    marginals: bool
    device: "torch.device"

    def read_all(self, progress: Progress | None) -> None:
        """Read all positions; `progress` counts positions."""
        import torch

        cache, count = self.sample.cache, self.sample.count
        self.head: TorchHead = cache.head.torch(self.device)
        tiles = TileRows(default_window_rows(cache.vocab, self.device), self.device)

        def read(rows: slice) -> None:
            self._read_block(rows)
            if progress is not None:
                progress(rows.stop, count)

        with torch.no_grad():
            tiles.run(count, read)

    def _read_block(self, rows: slice) -> None:
        """Measure the positions `rows` of the sample at all layers, then keep the results."""
        import torch

        sample, cache = self.sample, self.sample.cache
        positions = sample.positions[rows]
        text = copy_to_device(torch.from_numpy(sample.text_tokens[rows]), self.device)
        last = self._states(cache.residual_array(cache.n_blocks), positions)
        model_logits = self.head(last)
        reference = Reference.of(model_logits, text)
        buffers = MeasureBuffers(
            min(len(positions), default_tile_rows(cache.vocab, self.device)),
            cache.vocab,
            self.device,
        )
        found: list[tuple[_Readings, int, dict[str, np.ndarray], np.ndarray | None, int]] = []
        shared: dict[int, torch.Tensor] = {}
        of_model = self._measure(reference, model_logits, buffers)
        for readings in self.readings.values():
            found.append((readings, cache.n_blocks, dict(of_model[0]), *of_model[1:]))
        del model_logits
        for layer in sorted({layer for r in self.readings.values() for layer in r.layers[:-1]}):
            shared.clear()
            for readings in self.readings.values():
                if layer not in readings.layers:
                    continue
                if readings.source is cache and layer in shared:
                    hidden = shared[layer]
                else:
                    hidden = self._states(readings.source.residual_array(layer), positions)
                    if readings.source is cache:
                        shared[layer] = hidden
                logits = self._logits(readings, hidden, rows, layer)
                check_logits_shape(logits, readings.name, (len(positions), cache.vocab))
                found.append((readings, layer, *self._measure(reference, logits, buffers)))
        for readings, layer, measured, total, n in found:
            readings.write(rows, layer, measured)
            if total is not None:
                readings.add_marginal(layer, total, n)

    def _states(self, array: Any, positions: np.ndarray) -> "torch.Tensor":
        """Residual stream at `positions` on the device, `(n, d_model)` float32."""
        import torch

        states = np.asarray(array[positions], np.float32)
        return copy_to_device(torch.from_numpy(states), self.device)

    def _logits(
        self, readings: _Readings, hidden: "torch.Tensor", rows: slice, layer: int
    ) -> "torch.Tensor":
        """Logits of a lens at offset 0, `(n, vocab)` float32."""
        import torch

        if type(readings.lens) is LogitLens:
            return self.head(hidden)
        sample = self.sample
        token, previous, position = (
            copy_to_device(torch.from_numpy(np.ascontiguousarray(values[rows])), self.device)
            for values in (sample.tokens, sample.previous_tokens, sample.positions)
        )
        batch = ReadoutBatch(
            hidden=hidden,
            last_token=token,
            head=self.head,
            token=token,
            previous_token=previous,
            position=position,
        )
        return readings.lens.logits(batch, layer, 0).float()

    def _measure(
        self, reference: Reference, logits: "torch.Tensor", buffers: MeasureBuffers
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None, int]:
        """Measures `(n,)` of a lens's logits, and the sum of its defined distributions."""
        import torch

        compared = compare_pairs(reference, logits, buffers=buffers)
        defined, both = compared.defined, compared.defined & reference.defined
        values = self._compared_measures(reference, compared)
        if any(name in self.measures for name in _OF_VOCABULARY) or self.marginals:
            of_vocabulary, total = self._vocabulary_measures(reference, logits, both)
            values |= of_vocabulary
        else:
            total = None
        if self.tracked is not None:
            token = torch.full_like(compared.top, self.tracked)
            own = value_at(logits, token)
            values["tracked_log_p"] = own - logits.logsumexp(-1)
            is_before = (logits > own[:, None]).sum(-1)
            ties = (logits[:, : self.tracked] == own[:, None]).sum(-1)
            values["tracked_rank"] = 1 + is_before + ties
        measured: dict[str, np.ndarray] = {}
        for name, found in values.items():
            if name in self.measures or name in TRACKED:
                is_known = defined if name in _OF_LENS_ALONE else both
                if name in ("cross_entropy", "text_rank"):
                    is_known = is_known & (reference.text >= 0)
                known = found.float().masked_fill(~is_known, float("nan"))
                measured[name] = copy_to_host(known).numpy()
        measured["top"] = copy_to_host(compared.top.masked_fill(~defined, -1)).numpy()
        return measured, total, int(both.sum()) if total is not None else 0

    def _compared_measures(
        self, reference: Reference, compared: Comparison
    ) -> "dict[str, torch.Tensor]":
        """Measures that a comparison of pairs gives."""
        top = compared.top
        return {
            "kl": compared.kl,
            "cross_entropy": compared.nll[1],
            "log_p_final": -compared.nll[0],
            "rank": compared.ranks[0] + 1,
            "text_rank": compared.ranks[1] + 1,
            "surprisal": -value_at(reference.log_p, top),
        }

    def _vocabulary_measures(
        self, reference: Reference, logits: "torch.Tensor", both: "torch.Tensor"
    ) -> "tuple[dict[str, torch.Tensor], np.ndarray | None]":
        """Measures that read both distributions, tile by tile of rows."""
        import torch

        n, vocab = logits.shape
        values = {name: logits.new_full((n,), float("nan")) for name in _OF_VOCABULARY}
        total = np.zeros(vocab) if self.marginals else None
        tile_rows = default_tile_rows(vocab, logits.device)
        for start in range(0, n, tile_rows):
            tile = slice(start, start + tile_rows)
            log_q, log_p, p = logits[tile].log_softmax(-1), reference.log_p[tile], reference.p[tile]
            q = log_q.exp()
            values["max_probability"][tile] = q.amax(-1)
            if "entropy" in self.measures:
                values["entropy"][tile] = -torch.where(q > 0, q * log_q, 0.0).sum(-1)
            if "total_variation" in self.measures:
                values["total_variation"][tile] = (p - q).abs().sum(-1) / 2
            if "js" in self.measures:
                log_middle = ((p + q) / 2).log()
                sides = torch.where(p > 0, p * (log_p - log_middle), 0.0)
                sides += torch.where(q > 0, q * (log_q - log_middle), 0.0)
                values["js"][tile] = (sides.sum(-1) / 2).clamp_min(0.0)
            if total is not None:
                known = q[both[tile]].double() if q.device.type == "cpu" else q[both[tile]]
                total += copy_to_host(known.sum(0)).double().numpy()
        return values, total
