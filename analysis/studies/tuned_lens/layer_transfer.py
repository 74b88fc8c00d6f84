"""Layer transfer: the translator of one layer on the states of another, and drift (2303.08112).

Where the residual stream hardly changes its basis from layer to layer, the translator of layer i
serves layer j nearly as well as the native one. The transfer penalty is what KL(model || lens) is
larger by. The paper finds it large where the covariances of two layers are unlike; the correlation
of both over all pairs is tested by permuting the layers (Mantel, 1967), for pairs are no
independent observations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.devices import TileRows, copy_to_device, copy_to_host
from ....cache.progress import Progress
from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval, bootstrap_interval
from ...evaluation.pair_tiles import default_tile_rows
from ..prediction_depth.rank_correlations import correlate_ranks
from ..trajectories.position_sample import PositionSample
from .layer_similarity import LayerPairRow

if TYPE_CHECKING:
    import torch

PERMUTATIONS = 999
"""Permutations of the layers behind the p value of a correlation over pairs."""
TILES = 4
"""Tiles of logits (`default_tile_rows`) that are worked on at once."""


@dataclass(frozen=True)
class LayerTransferRow:
    """The translator of one layer of a lens on the states of another layer; nats."""

    lens: str
    translator: int
    """Layer i whose translator is applied, ..."""
    layer: int
    """... and layer j of the states."""
    n: int
    """Positions, fewer than those of the study."""
    kl: float | None
    """Mean KL(model || translator i on layer j)."""
    penalty: float | None
    """`kl` less that of the native translator, i = j, on the same positions."""
    penalty_interval: Interval
    cross_entropy_penalty: float | None
    """The same of -log q of the text's next token."""
    kl_to_native: float | None
    """Mean KL(native lens at j || translator i on layer j)."""


@dataclass(frozen=True)
class DriftRow:
    """Spearman correlation of transfer penalty and similarity over the pairs of layers i != j."""

    lens: str
    similarity: str
    """Field of `LayerPairRow`."""
    layers: str
    """`all`, or `blocks`: without layer 0, the embedding, which may be unlike all others."""
    given: str
    """`distance`, |i - j|, for the partial correlation; else empty."""
    pairs: int
    correlation: float | None
    p_value: float | None
    """Two-sided, over permutations of the layers; None with fewer than 4 layers, or for `given`."""


def affine_map_of(lens: Readout, layer: int) -> Any:
    """The map `x @ weight + bias` of `lens` from `layer` to the last one; None without one."""
    if not callable(getattr(lens, "residual_map", None)) or hasattr(lens, "view"):
        return None
    readout: Any = lens
    return readout.residual_map(layer, 0)


def is_affine(lens: Readout, layers: Sequence[int]) -> bool:
    """Whether `lens` has an affine map to the last layer at each of `layers`."""
    return bool(layers) and all(affine_map_of(lens, layer) is not None for layer in layers)


def measure_transfer(
    sample: PositionSample,
    name: str,
    lens: Readout,
    layers: Sequence[int],
    *,
    positions: int,
    device: "torch.device",
    progress: Progress | None = None,
) -> list[LayerTransferRow]:
    """Every translator of `lens` on every one of `layers`, at `positions` random positions.

    The cost is that of len(layers)^2 unembeddings of the positions.
    """
    rng = np.random.default_rng([sample.seed, 1])
    chosen = np.sort(rng.permutation(sample.count)[:positions])
    sums = _TransferReader(sample, lens, tuple(layers), chosen, device).read(progress)
    units, rows = sample.unit_numbers[chosen], []
    for column, layer in enumerate(layers):
        for number, translator in enumerate(layers):
            kl, loss, to_native = (sums[name][number, column] for name in ("kl", "loss", "native"))
            penalty = kl - sums["kl"][column, column]
            value, interval = _mean(penalty, units, sample.weights)
            rows.append(
                LayerTransferRow(
                    lens=name,
                    translator=translator,
                    layer=layer,
                    n=int((~np.isnan(penalty)).sum()),
                    kl=_mean(kl, units, sample.weights)[0],
                    penalty=value,
                    penalty_interval=interval,
                    cross_entropy_penalty=_mean(
                        loss - sums["loss"][column, column], units, sample.weights
                    )[0],
                    kl_to_native=_mean(to_native, units, sample.weights)[0],
                )
            )
    return rows


def _mean(
    values: np.ndarray, units: np.ndarray, weights: np.ndarray
) -> tuple[float | None, Interval]:
    """Mean of the values `(n,)` that are not NaN, and its interval over units."""
    known = ~np.isnan(values)
    if not known.any():
        return None, (None, None)
    n = np.bincount(units[known], minlength=weights.shape[1]).astype(np.float64)
    sums = np.bincount(units[known], values[known], minlength=weights.shape[1])
    return float(sums.sum() / n.sum()), bootstrap_interval(n, sums, weights)


@dataclass(eq=False)
class _TransferReader:
    """Reads the chosen positions of a sample, layer by layer, with every translator."""

    sample: PositionSample
    lens: Readout
    layers: tuple[int, ...]
    chosen: np.ndarray
    """Numbers of the positions in the sample, ascending, `(n,)`."""
    device: "torch.device"

    def read(self, progress: Progress | None) -> dict[str, np.ndarray]:
        """`kl`, `loss` and `native`, each `(translators, layers, n)` float64; NaN undefined."""
        import torch

        cache = self.sample.cache
        head = cache.head.torch(self.device)
        maps = [self._tensors(layer) for layer in self.layers]
        size = len(self.layers)
        sums = {
            name: np.full((size, size, len(self.chosen)), np.nan)
            for name in ("kl", "loss", "native")
        }

        def read(rows: slice) -> None:
            numbers = self.chosen[rows]
            text = torch.from_numpy(self.sample.text_tokens[numbers]).to(self.device)
            log_p = head(self._states(cache.n_blocks, numbers)).float().log_softmax(-1)
            found = {name: np.full((size, size, len(numbers)), np.nan) for name in sums}
            for column, layer in enumerate(self.layers):
                hidden = self._states(layer, numbers)
                native = _translated(head, hidden, maps[column])
                for number, affine in enumerate(maps):
                    log_q = native if number == column else _translated(head, hidden, affine)
                    own = log_q.gather(-1, text.clamp_min(0)[:, None])[:, 0]
                    measured = {
                        "kl": _divergence(log_p, log_q),
                        "native": _divergence(native, log_q),
                        "loss": (-own).masked_fill(text < 0, float("nan")),
                    }
                    for name, values in measured.items():
                        found[name][number, column] = copy_to_host(values).double().numpy()
            for name, values in found.items():
                sums[name][:, :, rows] = values
            if progress is not None:
                progress(rows.stop, len(self.chosen))

        tile_rows = TILES * default_tile_rows(cache.vocab, self.device)
        with torch.no_grad():
            TileRows(tile_rows, self.device).run(len(self.chosen), read)
        return sums

    def _tensors(self, layer: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Weight and bias of the translator of `layer`, float32 on the device."""
        import torch

        affine = affine_map_of(self.lens, layer).astype(np.float32)
        return (
            torch.from_numpy(affine.weight).to(self.device),
            torch.from_numpy(affine.bias).to(self.device),
        )

    def _states(self, layer: int, numbers: np.ndarray) -> "torch.Tensor":
        """Residual stream of `layer` at positions of the sample, `(n, d_model)` float32."""
        import torch

        positions = self.sample.positions[numbers]
        states = np.asarray(self.sample.cache.residual_array(layer)[positions], np.float32)
        return copy_to_device(torch.from_numpy(states), self.device)


def _translated(
    head: "Callable[[torch.Tensor], torch.Tensor]",
    hidden: "torch.Tensor",
    affine: "tuple[torch.Tensor, torch.Tensor]",
) -> "torch.Tensor":
    """log q of the head on translated states, `(n, vocab)`."""
    weight, bias = affine
    return head(hidden @ weight + bias).float().log_softmax(-1)


def _divergence(log_p: "torch.Tensor", log_q: "torch.Tensor") -> "torch.Tensor":
    """KL(p || q) of each row, `(n,)`; NaN where a row is no distribution."""
    import torch

    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    undefined = ~(log_p.amax(-1).isfinite() & log_q.amax(-1).isfinite())
    return terms.sum(-1).clamp_min(0.0).masked_fill(undefined, float("nan"))


def drift_rows(
    transfer: Sequence[LayerTransferRow], pairs: Sequence[LayerPairRow], seed: int = 0
) -> list[DriftRow]:
    """Correlation of penalty and similarity for every lens, plain and given the distance."""
    similarities: dict[str, dict[tuple[int, int], float | None]] = {
        field: {
            pair: getattr(row, field)
            for row in pairs
            for pair in ((row.layer, row.other), (row.other, row.layer))
        }
        for field in ("similarity", "similarity_without_largest")
    }
    rows = []
    for lens in dict.fromkeys(row.lens for row in transfer):
        own = [row for row in transfer if row.lens == lens]
        penalty_of = {(row.translator, row.layer): row.penalty for row in own}
        every = sorted({row.layer for row in own})
        groups = {"all": every, "blocks": [layer for layer in every if layer]}
        for (field, similarity_of), (name, layers) in product(similarities.items(), groups.items()):
            if name == "blocks" and len(layers) in (0, len(every)):
                continue
            penalty, similarity = _matrix(layers, penalty_of), _matrix(layers, similarity_of)
            for given in ("", "distance"):
                rho, pairs_known = _pair_correlation(layers, penalty, similarity, bool(given))
                rows.append(
                    DriftRow(
                        lens=lens,
                        similarity=field,
                        layers=name,
                        given=given,
                        pairs=pairs_known,
                        correlation=rho,
                        p_value=None
                        if given or rho is None
                        else mantel_p_value(penalty, similarity, rho, seed),
                    )
                )
    return rows


def _pair_correlation(
    layers: Sequence[int], penalty: np.ndarray, similarity: np.ndarray, given_distance: bool
) -> tuple[float | None, int]:
    """Correlation over the ordered pairs i != j with both numbers, and how many there are."""
    known = ~np.eye(len(layers), dtype=bool) & ~np.isnan(penalty) & ~np.isnan(similarity)
    numbers = np.array(layers, np.float64)
    distance = np.abs(numbers[:, None] - numbers)[known] if given_distance else None
    return _rank_correlation(penalty[known], similarity[known], distance), int(known.sum())


def mantel_p_value(
    penalty: np.ndarray, similarity: np.ndarray, rho: float, seed: int
) -> float | None:
    """Share of permutations of the layers with a correlation as far from 0, `(1 + r) / (1 + R)`.

    The matrices `(layers, layers)` have NaN where nothing is known. None for fewer than 4 layers.
    """
    size = len(penalty)
    if size < 4:
        return None
    rng, as_far = np.random.default_rng(seed), 0
    for _ in range(PERMUTATIONS):
        order = rng.permutation(size)
        permuted = similarity[np.ix_(order, order)]
        known = ~np.eye(size, dtype=bool) & ~np.isnan(penalty) & ~np.isnan(permuted)
        found = _rank_correlation(penalty[known], permuted[known])
        as_far += found is not None and abs(found) >= abs(rho) - 1e-12
    return (1 + as_far) / (1 + PERMUTATIONS)


def _rank_correlation(
    x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None
) -> float | None:
    """Spearman correlation, without an interval."""
    one_unit = np.zeros(len(x), np.int64)
    return correlate_ranks(x, y, one_unit, np.ones((0, 1)), given).value


def _matrix(layers: Sequence[int], values: Mapping[tuple[int, int], float | None]) -> np.ndarray:
    """Values by pairs of layers as a matrix; NaN where there is none."""
    found = [[values.get((i, j)) for j in layers] for i in layers]
    return np.array([[np.nan if v is None else v for v in row] for row in found], np.float64)
