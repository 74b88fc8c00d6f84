"""The plan of an evaluation: probes with the layers and offsets to read, in reading order.

`plan_evaluation` adds the baselines (logit lens, bigram) to the probes and checks that the cache
has the layers and the probes have the offsets. `evaluate` then reads the plan group by group; a
group is all results that read the same rows of the same layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import as_tuple, format_ranges
from ...cache.progress import Auto
from ...cache.tokens.segments import is_of_images
from ...probes.base.readout import Readout
from ...probes.baselines.ngrams import Bigram, CrossFittedBigram
from ...probes.baselines.token_counts import CountBaseline
from ...probes.lens.logit_lens import LogitLens
from .confidence_buckets import ResultKey
from .probe_names import describe_names, name_readouts, probe_list

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

DEFAULT_OFFSETS = (0, 1, 2, 3)
FITTED_SPLITS = ("train", "all")
"""Splits with text that probes and baselines are fitted on."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Which probe is read at which layers and offsets."""

    readouts: dict[str, Readout]
    """Probes by name, baselines first."""
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Sentences that name the probes without some of the layers and offsets, and say which probe a
    given name, or the number of a kind, stands for."""
    baseline_notes: tuple[str, ...] = ()
    """Sentences that say why a baseline is left out."""

    @cached_property
    def keys(self) -> list[ResultKey]:
        """All results, sorted by offset, then probe, then layer."""
        ordered = {
            (offset, order, -1 if layer is None else layer, ResultKey(name, layer, offset))
            for order, (name, readout) in enumerate(self.readouts.items())
            for layer, offset in readout.pairs()
            if offset in self.offsets and (layer is None or layer in self.layers)
        }
        return [key for *_, key in sorted(ordered, key=lambda entry: entry[:3])]

    def groups(self, cache: "ActivationCache") -> "list[ReadGroup]":
        """Results that read the same rows: one group per layer, and per layer of each control."""
        group_of: dict[tuple[str, int], ReadGroup] = {}
        for key in self.keys:
            # A control reads its own view of the cache, so nothing can share its rows.
            view = getattr(self.readouts[key.probe], "view", None)
            rows = (key.probe if view else "", -1 if key.layer is None else key.layer)
            if rows not in group_of:
                group_of[rows] = ReadGroup(view(cache) if view else cache, key.layer, [])
            group_of[rows].keys.append(key)
        return [group_of[rows] for rows in sorted(group_of)]


@dataclass(frozen=True)
class ReadGroup:
    """Results that read the same rows of the same layer."""

    cache: "ActivationCache"
    """The evaluated cache, or the view of the cache that a control reads."""
    layer: int | None
    """Layer to read; None for probes that read tokens alone."""
    keys: list[ResultKey]


def plan_evaluation(
    cache: "ActivationCache",
    probes: Sequence[Readout] | Mapping[str, Readout],
    *,
    offsets: int | Iterable[int] | None = None,
    layers: int | Iterable[int] | None = None,
    split: str = "test",
    across_documents: bool = False,
    progress: Auto | None = "auto",
) -> EvaluationPlan:
    """Plan the evaluation of `probes`, the logit lens and a bigram on `split` of `cache`.

    `offsets` and `layers` default to those of the probes, else to 0-3 and all layers. The bigram is
    fitted here, on the train split; `progress` is that of its fit. Raises `UsageError` for negative
    offsets, `NotFoundError` for a layer that the cache lacks and for probes without any of the
    layers and offsets.
    """
    requested_offsets = None if offsets is None else as_tuple(offsets, "offsets")
    requested_layers = None if layers is None else as_tuple(layers, "layers")
    listed = probe_list(probes)
    probe_pairs = [pair for probe in listed for pair in probe.pairs()]

    # Defaults come from the probes.
    plan_offsets, plan_layers = requested_offsets, requested_layers
    if plan_offsets is None:
        default = (0,) if is_of_images(cache) else DEFAULT_OFFSETS
        plan_offsets = tuple(sorted({offset for _, offset in probe_pairs})) or default
    if plan_layers is None:
        probe_layers = {layer for layer, _ in probe_pairs if layer is not None}
        plan_layers = tuple(sorted(probe_layers)) or cache.layers
    if not plan_offsets or min(plan_offsets) < 0:
        raise UsageError(
            f"name at least one offset; offsets are 0 or more, not {list(plan_offsets)}"
        )
    if is_of_images(cache) and max(plan_offsets) > 0 and not across_documents:
        raise UsageError(
            f"offsets {format_ranges([n for n in plan_offsets if n])} have no meaning in a cache "
            "of images, in which position t+N is another patch; measure offset 0"
        )
    if not plan_layers:
        raise UsageError(
            "name at least one layer; the cache holds "
            + (f"layers {format_ranges(cache.layers)}" if cache.layers else "no whole layer")
        )

    # Raises where the cache lacks a layer; the model's own logits come from the last one.
    for layer in (*plan_layers, cache.n_blocks):
        cache.residual_array(layer)
    plan_offsets, plan_layers = tuple(sorted(set(plan_offsets))), tuple(sorted(set(plan_layers)))
    coverage_notes = check_coverage(probes, requested_layers, requested_offsets)

    # Baselines beside the probes, unless the caller gives a probe of the same kind.
    kinds = {probe.kind for probe in listed}
    baselines: list[Readout] = []
    baseline_notes: list[str] = []
    later_offsets = tuple(offset for offset in plan_offsets if offset > 0)
    if Bigram.kind not in kinds and later_offsets and len(cache.sequences("train")):
        bigram_class = CrossFittedBigram if split in FITTED_SPLITS else Bigram
        try:
            bigram = bigram_class(later_offsets, across_documents)
            baselines.append(bigram.fit(cache, progress=progress))
        except UsageError as error:
            baseline_notes.append(f"there is no bigram beside the probes: {error}")
    if LogitLens.kind not in kinds:
        baselines.append(LogitLens(plan_layers, plan_offsets))

    readouts = name_readouts(probes, baselines)
    return EvaluationPlan(
        readouts=readouts,
        layers=plan_layers,
        offsets=plan_offsets,
        notes=(*coverage_notes, *describe_names(readouts)),
        baseline_notes=tuple(baseline_notes),
    )


def check_coverage(
    probes: Sequence[Readout] | Mapping[str, Readout],
    layers: Sequence[int] | None,
    offsets: Sequence[int] | None,
) -> list[str]:
    """Notes on the probes that lack some of the requested `layers` and `offsets` (None: all).

    Raises `NotFoundError` for an offset that no probe has, and for a probe without any requested
    pair. Baselines may lack every pair: they are floors for the other probes. A layer that no
    probe has is fine: the logit lens is measured there.
    """
    probe_by_name, notes = name_readouts(probes), []

    # Every probe but a baseline needs one pair at least.
    for name, probe in probe_by_name.items():
        has_pair = any(
            (layers is None or layer is None or layer in layers)
            and (offsets is None or offset in offsets)
            for layer, offset in probe.pairs()
        )
        if not has_pair and not isinstance(probe, CountBaseline):
            raise NotFoundError(
                f"{name} was fitted for none of the pairs asked for (layers "
                f"{'all' if layers is None else format_ranges(layers)}, offsets "
                f"{'all' if offsets is None else format_ranges(offsets)}); it has "
                f"{format_coverage(probe)}"
            )

    # Every offset needs one probe at least, unless all probes are baselines.
    offsets_of = {name: {n for _, n in probe.pairs()} for name, probe in probe_by_name.items()}
    if any(not isinstance(probe, CountBaseline) for probe in probe_by_name.values()):
        for offset in offsets or ():
            if not any(offset in probe_offsets for probe_offsets in offsets_of.values()):
                coverage = "; ".join(
                    f"{name} has {format_coverage(probe)}" for name, probe in probe_by_name.items()
                )
                raise NotFoundError(f"no probe was fitted for offset {offset}: {coverage}")

    # What else is missing is said.
    for name, probe in probe_by_name.items():
        probe_layers = {layer for layer, _ in probe.pairs() if layer is not None}
        for dimension, requested, fitted in (
            ("layer", layers, probe_layers),
            ("offset", offsets, offsets_of[name]),
        ):
            missing = sorted(set(requested or ()) - fitted)
            if fitted and missing:
                notes.append(
                    f"{name} was not fitted for {dimension} {format_ranges(missing)}: no row there"
                )
    return notes


def format_coverage(probe: Readout) -> str:
    """The layers and offsets of `probe` as text: `layers 0-6, offsets 0-3`."""
    layers = sorted({layer for layer, _ in probe.pairs() if layer is not None})
    offsets = f"offsets {format_ranges(sorted({offset for _, offset in probe.pairs()}))}"
    return f"layers {format_ranges(layers)}, {offsets}" if layers else offsets
