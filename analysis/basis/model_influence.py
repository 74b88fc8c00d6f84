"""Is a causal basis true of the model? `measure_model_influence` ablates it there.

A basis is fitted by its influence on a lens. Here the same directions are ablated in the model: the
layer is read from the cache, changed, and the model is run on from there. If the lens is faithful,
both influences rank the directions alike (Belrose et al., 2303.08112, sections 4.1 to 4.3).

Batches come from `influence_sample.py`, the resumed model from `cache/model/resume.py`, the
alignment of whole states from `stimulus_response.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import MismatchError, ModelError, UsageError
from ...cache.files.json_files import plain_value
from ...cache.number_ranges import as_whole_number, format_ranges
from ...cache.progress import Progress
from ...probes.base.resampling import bootstrap_interval, resampling_counts
from ...probes.basis.layer_basis import LayerBasis
from ...probes.ridge.solver import AffineMap
from .influence_sample import InfluenceSample, SampleBatch

if TYPE_CHECKING:
    import torch

    from ...cache.model.blocks import DecoderBlocks
    from ...cache.model.resume import ResumableRun
    from ...cache.store.activation_cache import ActivationCache
    from .layer_pass import LayerPass, Readout
    from .stimulus_response import AlignmentTally

SpanInfluences = dict[int, dict[str, float | None]]
"""Size of a span -> mean `kl` in nats, and its 95 % interval `low`, `high`."""
Bases = Mapping[int, LayerBasis]
"""Layer -> basis."""


@dataclass(frozen=True)
class ModelInfluence:
    """Influence of the directions of one layer on the lens and on the model, over `n` positions.

    An influence is the mean KL(unchanged || ablated) in nats. Intervals are of 95 %, by document;
    None with fewer than two documents.
    """

    layer: int
    n: int
    """Number of positions, on the test split."""
    units: int
    """Number of documents that intervals resample; sequences if all positions are of one."""
    lens_influences: tuple[float, ...]
    """KL of the lens's prediction, each direction ablated alone."""
    model_influences: tuple[float, ...]
    """KL of the model's prediction, each direction ablated alone at every position."""
    lens_span: SpanInfluences
    """KL of the lens's prediction, the first 1, 2, 4, .., K directions ablated together."""
    model_span: SpanInfluences
    """The same in the model."""
    control_spans: dict[str, SpanInfluences]
    """The same in the model for other bases, by their names."""
    spearman: dict[str, float | None]
    """Rank correlation of both influences: `value`, `low`, `high`; None for k < 3."""
    alignment: dict[str, float | int | None]
    """Stimulus-response alignment of whole states: `mean`, `low`, `high`, number `n` of points."""
    span_alignment: dict[str, float | int | None]
    """The same where only the coordinates on the K directions are replaced."""
    resumed: bool
    """Whether the blocks below the layer were skipped; False if all of them had to run."""

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values for JSON; undefined and infinite numbers are None."""
        return plain_value(asdict(self))


def measure_model_influence(
    cache: "ActivationCache",
    bases: Bases,
    maps: Mapping[int, AffineMap],
    blocks: "DecoderBlocks",
    *,
    controls: Mapping[str, Bases] | None = None,
    positions: int = 8192,
    alignment_positions: int = 256,
    seed: int = 0,
    drop_first: int = 0,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[int, ModelInfluence]:
    """Ablate the `bases` of each layer in the model, and compare with the lens of `maps`.

    `blocks` are those of the model of `cache` (`load_model_of`); `maps` are the lens's affine maps
    to layer L, by layer. `controls` are other bases to ablate in the model, by a name and by layer.
    Whole sequences of the test split are drawn, up to `positions` positions; directions are ablated
    at all of them but the `drop_first` first positions of each context, which stay as they are and
    do not count. The layer is read from the cache before and after an ablation, so its rounding in
    the cache has no influence.

    `alignment_positions` states are replaced for the stimulus-response alignment, one at a time in
    each sequence; 0 leaves the alignment out. Time per layer and sequence: k resumed runs for
    single directions, about log2(k) for the spans of each basis, two for each replaced state. A
    batch has at most `batch_tokens` tokens (default: 64 MiB of logits). `progress` is called with
    (done, total) in positions times layers. Where a model cannot be resumed, all its blocks run.

    Raises `UsageError` if the cache has only some positions of its sequences, `MismatchError` if
    it is not of this model.
    """
    import torch

    from ...cache.devices import memory_errors
    from ...cache.model.model_devices import input_device
    from ...cache.model.resume import ResumableRun
    from .layer_pass import LayerPass, LensOnDevice, cached_stream
    from .stimulus_response import AlignmentTally, StimulusPoints

    # Check the arguments, draw sequences and points.
    controls = controls or {}
    layers = _check_bases(cache, bases, maps, controls)
    _check_geometry(cache, blocks)
    positions = _check_count("positions", positions, 1)
    alignment_positions = _check_count("alignment_positions", alignment_positions, 0)
    batch_tokens = None if batch_tokens is None else _check_count("batch_tokens", batch_tokens, 1)
    seed = _check_count("seed", seed, 0)
    sample = InfluenceSample.draw(cache, positions, drop_first, seed)
    points = StimulusPoints.draw(sample, alignment_positions, seed)
    device = input_device(blocks.model)
    head = cache.head.torch(str(device))
    n_units = sample.units.n_resampled
    tallies = {
        layer: LayerTally(
            basis=bases[layer],
            controls={name: other[layer] for name, other in controls.items() if layer in other},
            alignment=AlignmentTally(points, layer, bases[layer], n_units),
            units=n_units,
        )
        for layer in layers
    }

    # Batch by batch: one full pass, then each layer with all its ablations.
    done, total = 0, sample.n * len(layers)
    is_resumable: dict[int, bool] = {}
    too_large = (
        f"batches of {type(blocks.model).__name__} do not fit into memory beside the model; give a "
        "smaller batch_tokens, or another device"
    )
    with torch.inference_mode(), memory_errors(too_large):
        for batch in sample.batches(batch_tokens):
            ids, mask, counted = batch.model_inputs(device)
            run = ResumableRun(blocks, ids, mask)
            for layer, tally in tallies.items():
                hidden = cached_stream(run, batch, layer)
                # The first batch proves that the model resumes, and that the rows are its own.
                if layer not in is_resumable:
                    stored = cache.residual_array(layer).layout.logical_dtype
                    is_resumable[layer] = _check_layer(run, layer, hidden, stored)
                tally.add(
                    LayerPass(
                        batch=batch,
                        hidden=hidden,
                        counted=counted,
                        lens_logits=LensOnDevice(head, maps[layer], device),
                        model_logits=_model_readout(run, layer, is_resumable[layer]),
                    )
                )
                done += int(batch.counted.sum())
                if progress is not None:
                    progress(done, total)

    # Means and intervals, from one set of resamples.
    sizes = sample.unit_sizes()
    weights = resampling_counts(n_units, seed)
    return {
        layer: tally.result(layer, sizes, weights, is_resumable[layer], sample.units.count)
        for layer, tally in tallies.items()
    }


def _check_count(name: str, value: Any, smallest: int) -> int:
    """`value` as an int; raises `UsageError` unless it is a whole number from `smallest` on."""
    number = as_whole_number(value, name)
    if number < smallest:
        raise UsageError(f"{name} must be {smallest} or more, not {value}")
    return number


def _check_bases(
    cache: "ActivationCache",
    bases: Bases,
    maps: Mapping[int, AffineMap],
    controls: Mapping[str, Bases],
) -> list[int]:
    """Layers of `bases`, ascending; raises `UsageError` if a basis or map does not fit."""
    layers = sorted(bases)
    if not layers:
        raise UsageError("there is no basis to measure; give one for each layer")
    if missing := [layer for layer in layers if layer not in maps]:
        raise UsageError(
            f"maps must have the lens's map of every layer of the bases; found none for layers "
            f"{format_ranges(missing)}"
        )
    named = [
        ("bases", bases),
        *((f"controls[{name!r}]", other) for name, other in controls.items()),
    ]
    for name, group in named:
        for layer, basis in group.items():
            if basis.encoder.shape[1] != cache.d_model or not basis.k:
                raise UsageError(
                    f"{name}: expected a basis (k, {cache.d_model}) of layer {layer}, found "
                    f"{basis.encoder.shape}"
                )
    for layer in layers:
        cache.residual_array(layer)  # raises NotFoundError for a layer that the cache lacks
        if maps[layer].weight.shape != (cache.d_model, cache.d_model):
            raise UsageError(
                f"maps: expected a map ({cache.d_model}, {cache.d_model}) of layer {layer}, found "
                f"{maps[layer].weight.shape}"
            )
    return layers


def _check_geometry(cache: "ActivationCache", blocks: "DecoderBlocks") -> None:
    """Raise `MismatchError` unless `blocks` have the depth and width of the cache."""
    expected, found = (cache.n_blocks, cache.d_model), (blocks.depth, blocks.d_model)
    if expected != found:
        raise MismatchError(
            f"the cache is of a model with {expected[0]} blocks of width {expected[1]}, this model "
            f"has {found[0]} of width {found[1]}; give the model that the cache was extracted from"
        )


def _check_layer(run: "ResumableRun", layer: int, hidden: "torch.Tensor", stored: str) -> bool:
    """Whether the model can be resumed from `layer`; `hidden` are its rows, kept as `stored`.

    Raises `MismatchError` if the rows do not give the logits of the model.
    """
    from ...cache.checks.resume_check import check_cached_logits, check_resume

    try:
        check_resume(run, {layer: hidden}, {layer: stored})
    except ModelError:
        check_cached_logits(run, layer, run.overwrite(layer, hidden), stored)
        return False
    return True


def _model_readout(run: "ResumableRun", layer: int, is_resumable: bool) -> "Readout":
    """The model from layer `layer` on, as a function of the layer's stream."""
    logits_of = run.resume if is_resumable else run.overwrite
    return lambda hidden: logits_of(layer, hidden)


class LayerTally:
    """Sums of the influences of one layer by document, over all batches."""

    def __init__(
        self,
        basis: LayerBasis,
        controls: dict[str, LayerBasis],
        alignment: "AlignmentTally",
        units: int,
    ) -> None:
        self.basis = basis
        self.controls = controls
        self.alignment = alignment
        self._units = units
        self._sums: dict[tuple[str, str, int], np.ndarray] = {}
        """KL by readout (`lens`, `model` or a control), ablation and its number; `(units,)`."""

    def add(self, layer_pass: "LayerPass") -> None:
        """Measure all ablations of a batch, and the alignment of its points."""
        rows = layer_pass.rows
        clean_lens = layer_pass.lens_logits(rows)
        clean_model = layer_pass.changed_logits(rows)
        for kind, number, ablated in _ablations(self.basis, rows):
            changes = {
                "lens": (clean_lens, layer_pass.lens_logits(ablated)),
                "model": (clean_model, layer_pass.changed_logits(ablated)),
            }
            for readout, (clean, changed) in changes.items():
                self._add_kl((readout, kind, number), clean, changed, layer_pass.batch)
        for name, control in self.controls.items():
            for size in span_sizes(control.k):
                changed = layer_pass.changed_logits(control.ablate(rows, size))
                self._add_kl(
                    (f"control {name}", "span", size), clean_model, changed, layer_pass.batch
                )
        self.alignment.add(layer_pass, clean_model)

    def _add_kl(
        self,
        key: tuple[str, str, int],
        clean: "torch.Tensor",
        changed: "torch.Tensor",
        batch: SampleBatch,
    ) -> None:
        """Add KL(clean || changed) of each counted position to the sum of its document."""
        from .distribution_changes import kl_divergence

        kl = kl_divergence(clean, changed).cpu().numpy()
        sums = self._sums.setdefault(key, np.zeros(self._units))
        sums += np.bincount(batch.unit_numbers, kl, self._units)

    def result(
        self, layer: int, sizes: np.ndarray, weights: np.ndarray, resumed: bool, units: int
    ) -> ModelInfluence:
        """Means and intervals; `sizes` are positions per unit, `weights` the resamples."""
        singles = {
            readout: np.stack(
                [self._single_sums(readout, number) for number in range(self.basis.k)]
            )
            for readout in ("lens", "model")
        }
        n = sizes.sum()
        alignment, span_alignment = self.alignment.results(weights)

        def spans(readout: str, k: int) -> SpanInfluences:
            return {
                size: _mean_with_interval(self._sums[readout, "span", size], sizes, weights)
                for size in span_sizes(k)
            }

        return ModelInfluence(
            layer=layer,
            n=int(n),
            units=units,
            lens_influences=tuple((singles["lens"].sum(1) / n).tolist()),
            model_influences=tuple((singles["model"].sum(1) / n).tolist()),
            lens_span=spans("lens", self.basis.k),
            model_span=spans("model", self.basis.k),
            control_spans={
                name: spans(f"control {name}", control.k) for name, control in self.controls.items()
            },
            spearman=rank_correlation(singles["lens"], singles["model"], sizes, weights),
            alignment=alignment,
            span_alignment=span_alignment,
            resumed=resumed,
        )

    def _single_sums(self, readout: str, number: int) -> np.ndarray:
        """Sums of the direction `number` ablated alone; the first is the span of size 1."""
        key = ("single", number) if number else ("span", 1)
        return self._sums[readout, *key]


def _ablations(
    basis: LayerBasis, rows: "torch.Tensor"
) -> "Iterator[tuple[str, int, torch.Tensor]]":
    """Yield kind, number and ablated rows: spans by their size, then the other directions alone."""
    for size in span_sizes(basis.k):
        yield "span", size, basis.ablate(rows, size)
    for direction in range(1, basis.k):
        yield "single", direction, basis.ablate_direction(rows, direction)


def span_sizes(k: int) -> list[int]:
    """Sizes of the spans that are measured: 1, 2, 4, .., and `k` itself."""
    return [*(1 << power for power in range(k.bit_length()) if 1 << power < k), k]


def _mean_with_interval(
    sums: np.ndarray, sizes: np.ndarray, weights: np.ndarray
) -> dict[str, float | None]:
    low, high = bootstrap_interval(sizes, sums, weights)
    return {"kl": float(sums.sum() / sizes.sum()), "low": low, "high": high}


def rank_correlation(
    lens_sums: np.ndarray, model_sums: np.ndarray, sizes: np.ndarray, weights: np.ndarray
) -> dict[str, float | None]:
    """Spearman correlation of the influences on lens and model, with its 95 % interval.

    `lens_sums` and `model_sums` `(k, units)` are sums of KL by direction and document, `sizes`
    `(units,)` the positions of each document. Each resample of the documents gives influences, and
    ranks, of its own. None for k < 3, for equal influences, and for intervals of one document.
    """
    if len(lens_sums) < 3:
        return {"value": None, "low": None, "high": None}
    value = _spearman(lens_sums.sum(1), model_sums.sum(1))
    low = high = None
    count = weights @ sizes
    if np.count_nonzero(sizes) > 1:
        lens, model = (
            (weights @ sums.T)[count > 0] / count[count > 0, None]
            for sums in (lens_sums, model_sums)
        )
        values = _spearman(lens, model)
        if np.isfinite(values).any():
            low, high = (float(bound) for bound in np.nanpercentile(values, (2.5, 97.5)))
    return {"value": float(value) if np.isfinite(value) else None, "low": low, "high": high}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman correlation along the last axis, `(...,)`; NaN for equal or undefined values."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=-1) for values in (x, y)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    scale = np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))
    correlation = (x * y).sum(-1) / np.where(scale > 0, scale, np.nan)
    return np.clip(correlation, -1, 1)
