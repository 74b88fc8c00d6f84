"""`LayerRuns`: the model of a cache, run on from cached layers of whole sequences.

All interventions run here. A layer is read from the cache before and after a change, so that its
rounding in the cache has no influence; batches obey the cache's rules (`InfluenceSample.batches`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import MismatchError, UsageError
from ...cache.tokens.segments import document_of, is_sparse
from ..basis.influence_sample import InfluenceSample, SampleBatch
from ..studies.trajectories.position_sample import PositionSample, choose_positions

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

MEAN_POSITIONS = 16384
"""Most positions of the train split behind a mean row."""


@dataclass(eq=False)
class LayerRuns:
    """Whole sequences of a cache whose model runs on from any cached layer."""

    sample: PositionSample
    model: "ResumableModel"
    batch_tokens: int | None = None
    _checked: set[int] = field(default_factory=set)
    """Layers whose rows were compared with the model."""

    @classmethod
    def prepare(
        cls,
        cache: "ActivationCache",
        model: "ResumableModel | torch.nn.Module | str | Path | None" = None,
        *,
        split: str = "test",
        max_positions: int = 4096,
        seed: int = 0,
        device: str = "auto",
        trust_remote_code: bool = False,
        batch_tokens: int | None = None,
    ) -> "LayerRuns":
        """Draw sequences of `split` and load the model of `cache`, or check the given `model`.

        Raises `UsageError` for a cache that keeps only some positions, `MismatchError` for the
        model of another cache.
        """
        if is_sparse(cache):
            raise UsageError(
                "the model can only be resumed on whole sequences, and this cache keeps some of "
                "their positions; extract the texts with --positions all"
            )
        sample = choose_positions(cache, split, max_positions, seed)
        loaded = load_resumable(cache, model, device, trust_remote_code)
        return cls(sample, loaded, batch_tokens)

    @property
    def cache(self) -> "ActivationCache":
        """The cache of the rows."""
        return self.sample.cache

    def batches(self) -> Iterator["RunBatch"]:
        """Yield all sequences of the sample in batches."""
        counted = np.ones(len(self.sample.positions), bool)
        influence = InfluenceSample(self.cache, self.sample.sequences, counted, self.sample.units)
        for batch in influence.batches(self.batch_tokens):
            ids, mask, _ = batch.model_inputs(self.model.device)
            yield RunBatch(self, batch, ids, mask)

    def is_resumed(self, layer: int) -> bool:
        """Whether the blocks up to `layer` are skipped; otherwise all of them run each time."""
        return self.model.can_resume(layer)


@dataclass(eq=False)
class RunBatch:
    """Sequences of one batch; rows `(n, ...)` are the positions of the text, without padding."""

    runs: LayerRuns
    batch: SampleBatch
    ids: "torch.Tensor"
    mask: "torch.Tensor | None"

    @property
    def numbers(self) -> np.ndarray:
        """Index in the sample of each row, `(n,)` int64."""
        return self.batch.sample_index

    def rows(self, layer: int) -> "torch.Tensor":
        """Cached rows of `layer`, `(n, d_model)` float32 on the model's device."""
        import torch

        array = self.runs.cache.residual_array(layer)
        rows = np.asarray(array.take(self.batch.positions), np.float32)
        return torch.from_numpy(rows).to(self.ids.device)

    def logits(self, layer: int, rows: "torch.Tensor") -> "torch.Tensor":
        """Logits `(n, vocab)` of the model when `rows` `(n, d_model)` are its layer `layer`."""
        import torch

        row, column = (
            torch.from_numpy(index).to(self.ids.device)
            for index in (self.batch.row, self.batch.column)
        )
        hidden = rows.new_zeros((*self.ids.shape, rows.shape[1]))
        hidden = hidden.index_put((row, column), rows)
        model = self.runs.model
        run = model.resume if self.runs.is_resumed(layer) else model.overwrite
        return run(layer, hidden, self.ids, self.mask)[row, column]

    def clean_logits(self, layer: int) -> "torch.Tensor":
        """Logits of the unchanged rows of `layer`; the first batch compares them with layer L.

        Raises `MismatchError` if they are not those of the model.
        """
        logits = self.logits(layer, self.rows(layer))
        if layer not in self.runs._checked:
            self._check(layer, logits)
            self.runs._checked.add(layer)
        return logits

    def _check(self, layer: int, logits: "torch.Tensor") -> None:
        """Compare logits of the resumed model with the head on the cached rows of layer L."""
        import torch

        from ...cache.checks.independence import row_change
        from ...cache.checks.reference_rows import LIMIT

        cache = self.runs.cache
        expected = cache.head.torch(str(self.ids.device))(self.rows(cache.n_blocks))
        stored = cache.residual_array(layer).layout.logical_dtype
        dtype = max(
            (getattr(torch, cache.manifest.capture.compute_dtype), getattr(torch, stored)),
            key=lambda kind: torch.finfo(kind).eps,
        )
        error = row_change(expected, logits, dtype)
        limit = LIMIT.get(str(dtype).removeprefix("torch."), 1e-3)
        if not error <= limit:
            raise MismatchError(
                f"layer {layer} of the cache does not give the logits of its layer "
                f"{cache.n_blocks}: they differ by {error:.1e}, allowed {limit:.0e}; give the "
                "model that the cache was extracted from (--model)"
            )


def load_resumable(
    cache: "ActivationCache",
    model: Any = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> "ResumableModel":
    """The model of `cache`, ready to be resumed; `model` as in `load_model_of`, or resumable."""
    from ...cache.devices import choose_device
    from ...cache.extraction.model_reload import load_model_of
    from ...cache.resuming.resumable_model import ResumableModel

    if isinstance(model, ResumableModel):
        expected, found = (cache.n_blocks, cache.d_model), (model.depth, model.d_model)
        if expected != found:
            raise MismatchError(
                f"the cache is of a model with {expected[0]} blocks of width {expected[1]}, this "
                f"model has {found[0]} of width {found[1]}; give the cache's own"
            )
        return model
    name = str(choose_device(device))
    return ResumableModel(load_model_of(cache, model, name, trust_remote_code))


def mean_rows(
    cache: "ActivationCache", layers: "list[int]", seed: int = 0
) -> dict[int, np.ndarray]:
    """Mean of the finite rows of each layer on the train split, `(d_model,)` float64."""
    positions = train_positions(cache, seed)
    means = {}
    for layer in layers:
        total, count = np.zeros(cache.d_model), 0
        for block in np.array_split(positions, max(1, len(positions) // 4096)):
            rows = np.asarray(cache.residual_array(layer).take(block), np.float64)
            rows = rows[np.isfinite(rows).all(1)]
            total += rows.sum(0)
            count += len(rows)
        if not count:
            raise UsageError(f"layer {layer} has no finite row on the train split of this cache")
        means[layer] = total / count
    return means


def train_positions(cache: "ActivationCache", seed: int = 0) -> np.ndarray:
    """Up to `MEAN_POSITIONS` positions of whole sequences of the train split."""
    return choose_positions(cache, "train", MEAN_POSITIONS, seed).positions


def choose_layers(
    cache: "ActivationCache", layers: Any, *, lowest: int = 0, last: bool = False
) -> list[int]:
    """Layers to intervene at, ascending: all cached ones from `lowest` on by default.

    The last layer is among the default ones if `last`; -1 is the last layer. Raises `NotFoundError`
    for a layer that the cache lacks.
    """
    from ...cache.number_ranges import absolute_numbers, as_tuple

    if layers is None:
        highest = cache.n_blocks if last else cache.n_blocks - 1
        chosen = [layer for layer in cache.layers if lowest <= layer <= highest]
    else:
        chosen = list(absolute_numbers(as_tuple(layers, "layers"), cache.n_blocks) or ())
    if not chosen:
        raise UsageError("there is no layer to intervene at; give --layers, such as 1-3")
    for layer in chosen:
        if layer < lowest:
            raise UsageError(f"layers start at {lowest} here, not at {layer}")
        cache.residual_array(layer)  # raises NotFoundError for a layer that the cache lacks
    return chosen


def spaced_positions(sample: PositionSample, spacing: int, reach: int) -> np.ndarray:
    """Bool mask `(n,)` of positions, one in `spacing` of each sequence, from a random start on.

    Those count whose next `reach` positions are of the same sequence and document. The random start
    is drawn by the seed of the sample. Raises `UsageError` if there is none.
    """
    if spacing <= reach:
        raise UsageError(f"spacing must be more than {reach}, the positions measured after each")
    rng = np.random.default_rng([sample.seed, 7])
    chosen = np.zeros(sample.count, bool)
    starts = np.flatnonzero(np.diff(sample.sequence_numbers, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], sample.count], strict=True):
        chosen[start + int(rng.integers(spacing)) : stop : spacing] = True
    chosen &= same_passage(sample, reach)
    if not chosen.any():
        raise UsageError(
            f"no sequence of the split {sample.split!r} is longer than the spacing of {spacing} "
            "positions; give a smaller --spacing"
        )
    return chosen


def same_passage(sample: PositionSample, steps: int) -> np.ndarray:
    """Whether the position `steps` further is of the same sequence and document, `(n,)` bool."""
    same = np.zeros(sample.count, bool)
    if steps < sample.count:
        ahead = np.arange(sample.count - steps) + steps
        documents = np.asarray(document_of(sample.cache, sample.positions))
        sequences = sample.sequence_numbers
        same[: sample.count - steps] = (sequences[ahead] == sequences[: len(ahead)]) & (
            documents[ahead] == documents[: len(ahead)]
        )
    return same
