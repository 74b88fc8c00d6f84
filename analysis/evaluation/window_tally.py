"""Step 3 of an evaluation: the measures of every probe in one window, added to the tally.

`WindowMeasurer` reads the rows of a window, layer by layer, copies them to the device, and compares
the logits of each probe with the model's. All matrices `(rows, vocab)` are written to again in the
next window.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ...cache.devices import TileRows, copy_to_device
from ...cache.errors import MismatchError
from ...cache.progress import Progress
from ...probes.base.readout import ReadoutBatch
from ...probes.base.resampling import ResamplingUnits
from ...probes.lens.logit_lens import LogitLens
from .confidence_buckets import BucketTally, ResultKey
from .distributions import MeasureBuffers, Reference
from .metrics import COLUMNS, MetricSums, measure_distribution
from .pair_tiles import as_rows, default_tile_rows
from .plan import EvaluationPlan, ReadGroup
from .probe_head import ModelRows, ProbeHead, VocabBuffers, choose_products
from .windows import MAX_ROWS, EvaluationSample, EvaluationWindow, evaluation_windows

if TYPE_CHECKING:
    import torch

    from ...cache.head.head import TorchHead
    from ...cache.store.activation_cache import ActivationCache

Observe = Callable[[ResultKey, EvaluationWindow, np.ndarray, np.ndarray], None]
"""Is called with the key of a result, a window, the numbers of the result's targets in the window
`(pairs,)`, and their measures `(pairs, columns)`."""


def tally_windows(
    sample: EvaluationSample,
    plan: EvaluationPlan,
    units: ResamplingUnits,
    tally: BucketTally,
    *,
    device: "torch.device",
    products: str = "auto",
    batch_rows: int | None = None,
    observe: Observe | None = None,
    progress: Progress | None = None,
) -> str:
    """Add the measures of all positions of `sample` to `tally`, window by window.

    `observe` is called with the measures of single pairs, once for each result and window. A window
    that does not fit into the memory of `device` is halved, and so are the next. Gives the
    precision of the probes' products, `float32` or `bfloat16`.
    """
    import torch

    tiles = TileRows(batch_rows or MAX_ROWS, device)
    with torch.no_grad():
        measurer = WindowMeasurer(sample.cache, plan, tally, device, products)
        measurer.observe = observe
        for window in evaluation_windows(
            sample, plan.offsets, batch_rows=batch_rows, units=units, device=device
        ):

            def measure(targets: slice, window: EvaluationWindow = window) -> None:
                measurer.measure(window.part(targets, plan.offsets))

            tiles.run(window.stop - window.start, measure)
            if progress is not None:
                progress(window.stop, sample.targets.count)
    return measurer.products


class WindowMeasurer:
    """Measures windows of positions on one device; call under `torch.no_grad`."""

    def __init__(
        self,
        cache: "ActivationCache",
        plan: EvaluationPlan,
        tally: BucketTally,
        device: "torch.device",
        products: str,
    ) -> None:
        self.cache = cache
        self.plan = plan
        self.tally = tally
        self.device = device
        self.groups: list[ReadGroup] = plan.groups(cache)
        self.head: TorchHead = cache.head.torch(device)
        self.products: str = choose_products(products, self.head, device)
        """Precision of the head's products for probes; the model's own are float32."""
        self.observe: Observe | None = None
        """Called with the measures of single pairs of windows that were measured as a whole."""
        self._buffers = VocabBuffers(cache.vocab, device)
        self._measure_buffers: MeasureBuffers | None = None
        self._probe_head = ProbeHead(self.head, self._buffers, self.products)

    def measure(self, window: EvaluationWindow) -> None:
        """Add the measures of `window` to the tally: of all probes, or on an error of none."""
        try:
            self._measure(window)
        except BaseException:
            # If memory ran out, a smaller window needs smaller buffers.
            self._buffers.clear()
            self._measure_buffers = None
            raise

    def _measure(self, window: EvaluationWindow) -> None:
        # The model's own logits come from the last layer at the targets, once per window.
        n = window.stop - window.start
        last_layer = self._read(
            self.cache, self.cache.n_blocks, window.positions[window.target_rows]
        )
        logits = self._buffers.rows("log_p", n)
        self.head.write_logits(last_layer, logits)
        text = copy_to_device(window.next_token, self.device)
        reference = Reference.of(logits, text, log_p=logits, p=self._buffers.rows("p", n))
        self._probe_head.model_rows = None
        if self.products == "bfloat16" and bool(reference.defined.all()):
            self._probe_head.model_rows = ModelRows(self.head.normalize(last_layer), reference)

        # Sums of this window, by the few cells that occur in it.
        cells = self.tally.cells(window.unit_numbers, reference.confidence)
        window_cells, cell_of = np.unique(cells, return_inverse=True)
        buffers = self._buffers_of_measures(n)
        sums: dict[ResultKey, MetricSums] = {}
        observed: list[tuple[ResultKey, np.ndarray, np.ndarray]] = []
        for group in self.groups:
            for key, targets, measures in self._group_measures(group, window, reference, buffers):
                sums[key] = MetricSums(len(window_cells))
                sums[key].add_measures(cell_of[targets], measures)
                if self.observe is not None:
                    observed.append((key, targets, measures))
        for key, window_sums in sums.items():
            self.tally.sums[key].sums[window_cells] += window_sums.sums
        for key, targets, measures in observed:
            assert self.observe is not None
            self.observe(key, window, targets, measures)

    def _buffers_of_measures(self, rows: int) -> MeasureBuffers:
        """Buffers for the rows that are measured at once."""
        rows = min(rows, default_tile_rows(self.cache.vocab, self.device))
        if self._measure_buffers is None or self._measure_buffers.rows < rows:
            self._measure_buffers = None
            self._measure_buffers = MeasureBuffers(rows, self.cache.vocab, self.device)
        return self._measure_buffers

    def _group_measures(
        self,
        group: ReadGroup,
        window: EvaluationWindow,
        reference: Reference,
        buffers: MeasureBuffers,
    ) -> Iterator[tuple[ResultKey, np.ndarray, np.ndarray]]:
        """Read one layer of `window` and yield the measures of all results that need the layer.

        Yields the result's key, the numbers of its targets in the window `(pairs,)`, and measures
        `(pairs, columns)`; nothing for a result without a pair in the window.
        """
        states = None
        if group.layer is not None:
            states = self._read(group.cache, group.layer, window.positions)
        logit_lens = None
        of_targets: dict[str, TargetMeasures] = {}
        for key in group.keys:
            readout, targets = self.plan.readouts[key.probe], window.targets(key.offset)
            if not len(targets):
                continue
            sources = window.sources(targets, key.offset)
            if states is not None and type(readout) is LogitLens:
                # The logit lens says the same at every offset: the head runs once for all of them.
                if logit_lens is None:
                    self._probe_head.start_batch("logit_lens", window.nearest_targets())
                    logit_lens = self._probe_head(states)
                measures = measure_distribution(
                    reference, logit_lens, targets, sources, buffers=buffers
                )
                yield key, targets, measures.numpy()
                continue

            def measure(
                targets: np.ndarray, sources: np.ndarray, key: ResultKey = key
            ) -> np.ndarray:
                logits = self._logits(group, window, key, states, targets, sources)
                return measure_distribution(reference, logits, targets, buffers=buffers).numpy()

            if not getattr(readout, "reads_target_alone", False):
                yield key, targets, measure(targets, sources)
                continue
            known = of_targets.setdefault(key.probe, TargetMeasures(window.stop - window.start))
            missing = known.missing(targets)
            if missing.any():
                known.add(targets[missing], measure(targets[missing], sources[missing]))
            yield key, targets, known.values[targets]

    def _logits(
        self,
        group: ReadGroup,
        window: EvaluationWindow,
        key: ResultKey,
        states: "torch.Tensor | None",
        targets: np.ndarray,
        sources: np.ndarray,
    ) -> "torch.Tensor":
        """Logits of the result `key` for pairs of `sources` and `targets`, `(pairs, vocab)`.

        Valid until those of the next result.
        """
        batch = self._batch(window, states, targets, sources)
        self._probe_head.start_batch("logits", targets)
        logits = self.plan.readouts[key.probe].logits(batch, key.layer, key.offset)
        check_logits_shape(logits, key.probe, (len(targets), group.cache.vocab))
        return logits

    def _batch(
        self,
        window: EvaluationWindow,
        states: "torch.Tensor | None",
        targets: np.ndarray,
        sources: np.ndarray,
    ) -> ReadoutBatch:
        """What a readout is given for the pairs of `sources` and `targets`."""
        import torch

        position = torch.from_numpy(window.positions[window.target_rows[targets]])
        return ReadoutBatch(
            hidden=None if states is None else states[as_rows(sources)],
            last_token=copy_to_device(window.target_token[targets], self.device),
            head=self._probe_head,
            token=copy_to_device(window.token[sources], self.device),
            previous_token=copy_to_device(window.previous_token[targets], self.device),
            position=copy_to_device(position, self.device),
        )

    def _read(self, cache: "ActivationCache", layer: int, positions: np.ndarray) -> "torch.Tensor":
        """Residual stream of `layer` at `positions` on the device, `(n, d_model)` float32."""
        import torch

        return copy_to_device(torch.from_numpy(cache.residual_array(layer)[positions]), self.device)


class TargetMeasures:
    """Measures of a readout that says the same of a target t+N at every offset N.

    Such a readout is asked once for each target of a window.
    """

    def __init__(self, targets: int) -> None:
        self.values: np.ndarray = np.empty((targets, len(COLUMNS)))
        """Measures of each target, where they are known."""
        self._known = np.zeros(targets, bool)

    def missing(self, targets: np.ndarray) -> np.ndarray:
        """Whether the measures of each of `targets` `(n,)` are unknown, `(n,)` bool."""
        return ~self._known[targets]

    def add(self, targets: np.ndarray, measures: np.ndarray) -> None:
        """Note the `measures` `(n, columns)` of `targets` `(n,)`."""
        self.values[targets], self._known[targets] = measures, True


def check_logits_shape(logits: "torch.Tensor", probe: str, expected: tuple[int, int]) -> None:
    """Raise `MismatchError` unless `logits` have the shape `expected`, `(pairs, vocab)`."""
    if tuple(logits.shape) != expected:
        pairs, vocab = expected
        raise MismatchError(
            f"{probe} gives logits of shape {tuple(logits.shape)} for {pairs} pairs of a cache "
            f"with {vocab} tokens; use a probe of the same model"
        )
