"""Evaluates probes against the model's own predictions, streamed from a cache without the model."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import MismatchError, NotFoundError, ResiduaWarning, UsageError
from ...cache.format.manifest import SHORT_ID
from ...cache.head.head import TorchHead
from ...cache.number_ranges import as_tuple, as_whole_number, format_ranges
from ...cache.tokens.segments import PairScope
from ...probes.base.readout import Readout, ReadoutBatch
from ...probes.baselines.ngrams import Bigram, CrossFittedBigram
from ...probes.baselines.token_counts import CountBaseline
from ...probes.lens.logit_lens import LogitLens
from ...probes.ridge.error_share import ErrorShare, domination_message, error_shares
from ...probes.saved.save import check_belongs
from .confidence_buckets import BucketTally, ResultKey
from .metrics import EvaluationRow, Reference, resampling_counts
from .result import Evaluation
from .windows import (
    EvaluationWindow,
    ResamplingUnits,
    Targets,
    check_where,
    choose_sequences,
    evaluation_windows,
)

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache


DEFAULT_OFFSETS = (0, 1, 2, 3)
UNDEFINED_NAMED = 3
"""Most rows that the warning of undefined measures names."""
FITTED_SPLITS = ("train", "all")
"""Splits with text that probes and baselines are fitted on."""


def evaluate(
    cache: "ActivationCache",
    probes: Readout | Sequence[Readout] = (),
    *,
    split: str = "test",
    offsets: int | Iterable[int] | None = None,
    layers: int | Iterable[int] | None = None,
    max_positions: int = 16384,
    batch_rows: int | None = None,
    seed: int = 0,
    where: np.ndarray | None = None,
    force: bool = False,
    across_documents: bool = False,
    drop_first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure `probes` (or one), the logit lens and the bigram on whole sequences of `split`.

    Sequences are taken in a seeded random order up to `max_positions` positions (one at least).
    `offsets` and `layers` default to those of the probes, else to 0-3 and all layers. `batch_rows`
    limits the rows of a `(rows, vocab)` matrix. Float32; sums in float64.

    `where` is a bool mask `(positions,)` of the cache, such as `slices.names` makes: only pairs
    whose target t+N is in it are counted. The sequences are the same with and without a mask.

    Logits that are no distribution (NaN, +inf) make the measures of their row None: there is one
    `ResiduaWarning`, and `notes` name the rows.

    Pairs (t, t+N), and the text's tokens after them, stay inside one document of one sequence;
    `across_documents` allows pairs of two. The `drop_first` first positions of each sequence are no
    sources. Intervals resample documents. The bigram is counted on the train split; where that
    split is evaluated (`train`, `all`), on its documents of other folds (`CrossFittedBigram`).

    Raises `UsageError` if the split is empty or holds no pair, `where` is no such mask, or a probe
    holds NaN or an infinity; `NotFoundError` for a layer that the cache lacks, an offset that no
    given probe has, or a probe without a pair of those asked for; `MismatchError` for a probe of
    another model, unless `force`.
    """
    import torch

    max_positions, seed = (
        as_whole_number(max_positions, "max_positions"),
        as_whole_number(seed, "seed"),
    )
    given = list(probes) if isinstance(probes, Iterable) else [probes]
    for probe in given:
        check_belongs(probe, cache, force)
    check_where(cache, where)
    sequences = choose_sequences(cache, split, max_positions, seed)
    scope = PairScope(across_documents, drop_first).check()
    baselines = _Baselines(split, scope.across_documents)
    plan = _plan(cache, given, offsets, layers, baselines)
    groups = plan.groups(cache)
    positions = int(cache.sequence_length[sequences].sum())
    units = ResamplingUnits.of(cache, sequences, seed)
    targets = Targets.of(cache, sequences, scope, where)
    n = targets.count
    tally = BucketTally(plan.wanted(), units.slots, n)
    head = cache.head.torch()
    with torch.inference_mode():
        for window in evaluation_windows(
            cache, sequences, plan.offsets, batch_rows, where, scope, units
        ):
            _add_window(cache, head, plan, groups, window, tally)
            if progress is not None:
                progress(window.stop, n)
    rows, buckets = tally.rows(resampling_counts(units.slots, seed))
    if not rows:
        raise _no_pair(cache, sequences, split, plan.offsets, targets)
    undefined = _undefined(rows)
    if undefined:
        warnings.warn(undefined, ResiduaWarning, stacklevel=2)
    shares = _error_shares(cache, plan, sequences, scope, where)
    notes = [
        *plan.notes,
        *([undefined] if undefined else []),
        *_notes(cache, given, split, units, shares),
        *baselines.notes,
    ]
    return _evaluation(
        cache, plan, rows, buckets=buckets, split=split, seed=seed, n=n, positions=positions,
        sequences=len(sequences), **vars(scope), unit=units.name, units=units.count,
        crossing=_crossing(cache, sequences, scope, where, targets, plan.offsets), shares=shares,
        notes=tuple(notes),
    )  # fmt: skip


def _undefined(rows: Sequence[EvaluationRow]) -> str:
    """Says in which rows measures are undefined; empty if in none."""
    found = [row for row in rows if row.n_undefined]
    if not found:
        return ""
    parts = [
        f"{row.probe}{'' if row.layer is None else f' layer {row.layer}'} N = {row.offset} "
        f"({row.n_undefined:,} of {row.n:,} pairs)"
        for row in found[:UNDEFINED_NAMED]
    ]
    more = f" and {len(found) - len(parts)} more rows" if len(found) > len(parts) else ""
    return (
        "logits that are no distribution (NaN or +inf) leave measures undefined, they are None: "
        + ", ".join(parts)
        + more
    )


def _crossing(
    cache: "ActivationCache",
    sequences: np.ndarray,
    scope: PairScope,
    where: np.ndarray | None,
    targets: Targets,
    offsets: tuple[int, ...],
) -> dict[int, float]:
    """Share of the pairs of `sequences` that join two documents, by offset."""
    within = targets
    if scope.across_documents:
        within = Targets.of(cache, sequences, PairScope(False, scope.drop_first), where)
    return {offset: targets.crossing(within, offset) for offset in offsets}


def _error_shares(
    cache: "ActivationCache",
    plan: "_Plan",
    sequences: np.ndarray,
    scope: PairScope,
    where: np.ndarray | None,
) -> dict[ResultKey, ErrorShare]:
    """Who makes the squared errors of the maps to the last layer that are evaluated."""
    found: dict[ResultKey, ErrorShare] = {}
    for name, readout in plan.readouts.items():
        map_of = getattr(readout, "residual_map", None)
        keys = [key for key in plan.wanted() if key[0] == name] if map_of else []
        maps = {
            (key[1], key[2], cache.n_blocks): fitted
            for key in keys
            if map_of and key[1] is not None and (fitted := map_of(key[1], key[2])) is not None
        }
        shares = error_shares(cache, maps, sequences, scope, where)
        found |= {(name, layer, offset): share for (layer, offset, _), share in shares.items()}
    return found


def _notes(
    cache: "ActivationCache",
    probes: Sequence[Readout],
    split: str,
    units: ResamplingUnits,
    shares: dict[ResultKey, ErrorShare],
) -> tuple[str, ...]:
    """What to know when the numbers are read."""
    notes = [units.note] if units.note else []
    own = [p.kind for p in probes if getattr(p, "cache_id_", None) == cache.id]
    if split in FITTED_SPLITS and own:
        notes.append(
            f"the {split} split holds text that these probes were fitted on: {', '.join(own)}; "
            "use split='test' for what they say of other text"
        )
    by_layer = {(layer, offset, name): share for (name, layer, offset), share in shares.items()}
    if message := domination_message(by_layer):
        notes.append(message)
    return tuple(notes)


def _no_pair(
    cache: "ActivationCache",
    sequences: np.ndarray,
    split: str,
    offsets: tuple[int, ...],
    targets: Targets,
) -> UsageError:
    """Says why there is nothing to measure."""
    lengths = cache.sequence_length[sequences]
    least, n = min(offsets), int(targets.chosen.sum())
    if (targets.index >= least).any():
        return UsageError(
            f"`where` holds {n} of the {lengths.sum()} positions taken from the {split} split, "
            f"none with a token {least} before it; raise max_positions or use another mask"
        )
    if (targets.index_in_sequence >= least).any():
        return UsageError(
            f"no document of the {len(sequences)} {split} sequences is longer inside one sequence "
            f"than the offsets {offsets} ask for; use smaller offsets, or across_documents=True "
            "(--across-documents)"
        )
    return UsageError(
        f"no {split} sequence is longer than the offsets {offsets} ask for, beside the positions "
        f"that drop_first leaves out: the longest of {len(sequences)} has {lengths.max()} tokens"
    )


def _evaluation(
    cache: "ActivationCache", plan: "_Plan", rows: list[EvaluationRow], **taken: Any
) -> Evaluation:
    return Evaluation(
        rows=rows,
        cache_id=cache.id,
        model_name=cache.manifest.model_name,
        data_name=cache.manifest.data_name,
        layers=plan.layers,
        # An offset beyond every sequence has no row.
        offsets=tuple(sorted({row.offset for row in rows})),
        probes=tuple(plan.readouts),
        cache=cache,
        readouts=tuple(plan.readouts.values()),
        **taken,
    )


@dataclass(frozen=True)
class _Plan:
    """Which probe is read at which layers and offsets."""

    readouts: dict[str, Readout]
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Which probes lack some of the layers and offsets asked for."""

    def wanted(self) -> list[ResultKey]:
        """(name, layer, offset), sorted by offset, then probe, then layer."""
        found = []
        for order, (name, readout) in enumerate(self.readouts.items()):
            for layer, offset in readout.pairs():
                if offset in self.offsets and (layer is None or layer in self.layers):
                    found.append((offset, order, -1 if layer is None else layer, name))
        return [(n, None if la < 0 else la, offset) for offset, _, la, n in sorted(set(found))]

    def groups(self, cache: "ActivationCache") -> "list[_Group]":
        """What is read together: layer by layer, and the rows of each control by themselves."""
        found: dict[tuple[str, int], _Group] = {}
        for key in self.wanted():
            readout, layer = self.readouts[key[0]], -1 if key[1] is None else key[1]
            view = getattr(readout, "view", None)
            place = (key[0] if view else "", layer)
            if place not in found:
                found[place] = _Group(view(cache) if view else cache, key[1], [])
            found[place].keys.append(key)
        return [found[place] for place in sorted(found)]


@dataclass(frozen=True)
class _Group:
    """Keys that read the same rows."""

    cache: "ActivationCache"
    """The cache, or the view of it that a control reads."""
    layer: int | None
    keys: list[ResultKey]


def _plan(
    cache: "ActivationCache",
    probes: Sequence[Readout],
    offsets: int | Iterable[int] | None,
    layers: int | Iterable[int] | None,
    baselines: "_Baselines",
) -> _Plan:
    pairs = [pair for probe in probes for pair in probe.pairs()]
    asked_offsets = None if offsets is None else as_tuple(offsets, "offsets")
    asked_layers = None if layers is None else as_tuple(layers, "layers")
    offsets, layers = asked_offsets, asked_layers
    if offsets is None:
        offsets = tuple(sorted({offset for _, offset in pairs})) or DEFAULT_OFFSETS
    if layers is None:
        layers = tuple(sorted({la for la, _ in pairs if la is not None})) or cache.layers
    if not offsets or min(offsets) < 0:
        raise UsageError(f"offsets must be 0 or more, not {list(offsets)}")
    # Raises where the cache lacks a layer; the model's own logits come from the last one.
    for layer in (*layers, cache.n_blocks):
        cache.residual_array(layer)
    offsets, layers = tuple(sorted(set(offsets))), tuple(sorted(set(layers)))
    notes = _check_asked(probes, asked_layers, asked_offsets)
    readouts = _named([*baselines.of(cache, probes, layers, offsets), *probes])
    return _Plan(readouts, layers, offsets, (*notes, *_who_is_who(readouts)))


def _who_is_who(readouts: dict[str, Readout]) -> list[str]:
    """Says, of kinds of which there are several, which probe each name stands for."""
    kinds = [readout.kind for readout in readouts.values()]
    notes = []
    for name, readout in readouts.items():
        if kinds.count(readout.kind) > 1:
            folder = getattr(readout, "folder_", None)
            cache_id = getattr(readout, "cache_id_", None)
            told = [
                " ".join(repr(readout).split()),
                *([f"of cache {cache_id[:SHORT_ID]}"] if cache_id else []),
                *([f"in {folder}"] if folder else []),
            ]
            notes.append(f"{name} is {' '.join(told)}")
    return notes


def _check_asked(
    probes: Sequence[Readout], layers: Sequence[int] | None, offsets: Sequence[int] | None
) -> tuple[str, ...]:
    """Notes on the probes that lack some of the `layers` and `offsets` asked for.

    Raises `NotFoundError` for an offset that no probe has, and for a probe that has no pair of
    those asked for. Baselines, which are floors for the others, may have none; at layers that no
    probe has there is still the logit lens.
    """
    named, notes = _named(probes), []
    for name, probe in named.items():
        pairs = [
            (layer, offset)
            for layer, offset in probe.pairs()
            if (layers is None or layer is None or layer in layers)
            and (offsets is None or offset in offsets)
        ]
        if not pairs and not isinstance(probe, CountBaseline):
            raise NotFoundError(
                f"{name} was fitted for none of the pairs asked for (layers "
                f"{'all' if layers is None else format_ranges(layers)}, offsets "
                f"{'all' if offsets is None else format_ranges(offsets)}); it has {_has(probe)}"
            )
    known = {name: {offset for _, offset in probe.pairs()} for name, probe in named.items()}
    # Baselines are floors for the others: where there are no others, the logit lens is measured.
    fitted = any(not isinstance(probe, CountBaseline) for probe in named.values())
    for offset in (offsets or ()) if fitted else ():
        if not any(offset in found for found in known.values()):
            said = "; ".join(f"{name} has {_has(probe)}" for name, probe in named.items())
            raise NotFoundError(f"no probe was fitted for offset {offset}: {said}")
    for name, probe in named.items():
        read = {layer for layer, _ in probe.pairs() if layer is not None}
        for what, asked, found in (("layer", layers, read), ("offset", offsets, known[name])):
            if found and (lacking := sorted(set(asked or ()) - found)):
                notes.append(
                    f"{name} was not fitted for {what} {format_ranges(lacking)}: no row there"
                )
    return tuple(notes)


def _has(probe: Readout) -> str:
    """The layers and offsets of `probe` for a message."""
    layers = sorted({layer for layer, _ in probe.pairs() if layer is not None})
    offsets = f"offsets {format_ranges(sorted({offset for _, offset in probe.pairs()}))}"
    return f"layers {format_ranges(layers)}, {offsets}" if layers else offsets


@dataclass(frozen=True)
class _Baselines:
    """What is measured beside the probes."""

    split: str
    across_documents: bool
    notes: list[str] = field(default_factory=list)
    """Why a baseline is left out."""

    def of(
        self,
        cache: "ActivationCache",
        probes: Sequence[Readout],
        layers: tuple[int, ...],
        offsets: tuple[int, ...],
    ) -> list[Readout]:
        """The logit lens, and the bigram where it says something, unless they are given."""
        given = {probe.kind for probe in probes}
        ahead = tuple(offset for offset in offsets if offset > 0)
        out: list[Readout] = []
        if Bigram.kind not in given and ahead and len(cache.sequences("train")):
            kind = CrossFittedBigram if self.split in FITTED_SPLITS else Bigram
            try:
                out.append(kind(ahead, self.across_documents).fit(cache))
            except UsageError as error:
                self.notes.append(f"there is no bigram beside the probes: {error}")
        if LogitLens.kind not in given:
            out.append(LogitLens(layers, offsets))
        return out


def _named(readouts: Sequence[Readout]) -> dict[str, Readout]:
    """Readouts by kind; a second one of the same kind is called `ridge 2`."""
    named: dict[str, Readout] = {}
    for readout in readouts:
        same = sum(other.kind == readout.kind for other in named.values())
        named[f"{readout.kind} {same + 1}" if same else readout.kind] = readout
    return named


def _add_window(
    cache: "ActivationCache",
    head: TorchHead,
    plan: _Plan,
    groups: list[_Group],
    window: EvaluationWindow,
    tally: BucketTally,
) -> None:
    """Add one window to every sum: the model's logits once, then layer by layer."""
    import torch

    model = head(_hidden(cache, cache.n_blocks, window.positions[window.place]))
    reference = Reference.of(model, window.text)
    del model
    cells = tally.cells(window.slot, reference.confidence)
    for group in groups:
        rows = window.positions
        hidden = None if group.layer is None else _hidden(group.cache, group.layer, rows)
        # The logit lens says the same at every offset: one head for all of them.
        lens = None
        for key in group.keys:
            readout, offset = plan.readouts[key[0]], key[2]
            targets = window.targets(offset)
            if not len(targets):
                continue
            sources = window.sources(targets, offset)
            if hidden is not None and type(readout) is LogitLens:
                lens = head(hidden) if lens is None else lens
                logits = lens[sources]
            else:
                states = None if hidden is None else hidden[sources]
                position = torch.from_numpy(window.positions[window.place[targets]])
                tokens = window.read[sources], window.previous[targets], position
                batch = ReadoutBatch(states, window.token[targets], head, *tokens)
                logits = readout.logits(batch, key[1], offset)
                _check_logits(logits, key[0], len(targets), cache.vocab)
            tally.sums[key].add(cells[targets], reference, logits, targets)


def _check_logits(logits: "torch.Tensor", probe: str, n: int, vocab: int) -> None:
    if tuple(logits.shape) != (n, vocab):
        raise MismatchError(
            f"{probe} gives logits of shape {tuple(logits.shape)} for {n} pairs of a cache with "
            f"{vocab} tokens; use a probe of the same model"
        )


def _hidden(cache: "ActivationCache", layer: int, positions: np.ndarray) -> "torch.Tensor":
    import torch

    return torch.from_numpy(cache.residual_array(layer)[positions])
