"""What a layer carries: rows replaced at single positions, and whole blocks left out.

`study_patching` ablates one position in `spacing` of each sequence at each layer, and measures the
model's predictions there and at the next positions; it leaves each block out at all positions; and
it draws the map of one passage (`patch_map.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ...probes.base.resampling import Interval
from ..evaluation.probe_names import name_readouts
from ..studies.results.study_figures import HeatPanel, Panel, Series, StudyFigure
from ..studies.results.study_result import StudyResult, StudySubject, StudyTable
from .effects import Effects
from .layer_runs import (
    LayerRuns,
    RunBatch,
    choose_layers,
    mean_rows,
    spaced_positions,
)
from .optimal_constant import fit_constant
from .patch_map import PatchMap, patch_passage
from .row_changes import RowChange, remove_component, replace_by, resample_rows

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

KINDS = ("zero", "mean", "resample", "constant")
"""Kinds of ablation of whole rows."""


@dataclass(frozen=True)
class AblationRow:
    """Effect of ablating rows of one layer, on the prediction `offset` positions later."""

    layer: int
    kind: str
    """What the row becomes: `zero`, `mean`, `resample`, `constant`, or the name of a basis whose
    span is ablated."""
    offset: int
    n: int
    """Positions with defined predictions."""
    kl: float | None
    """Mean KL(unchanged || ablated), nats."""
    kl_interval: Interval
    loss_change: float | None
    """Mean change of the cross-entropy of the text's next token, nats."""
    loss_change_interval: Interval
    flips: float | None
    """Share of positions whose top token changes."""


@dataclass(frozen=True)
class BlockRow:
    """Effect of leaving one block out at all positions."""

    block: int
    """Number of the block, 1 to L: layer l becomes layer l - 1, and the mean update with `mean`."""
    kind: str
    """`deleted`, or `mean` where the block's mean update is added."""
    n: int
    kl: float | None
    kl_interval: Interval
    loss_change: float | None
    loss_change_interval: Interval
    flips: float | None


def study_patching(
    cache: "ActivationCache",
    bases: "Sequence[Any] | Mapping[str, Any]" = (),
    *,
    model: "ResumableModel | torch.nn.Module | str | Path | None" = None,
    kinds: Sequence[str] = ("zero", "mean", "resample"),
    layers: Any = None,
    spacing: int = 16,
    offsets: int = 3,
    passage: int | None = None,
    source: int | None = None,
    tokens: tuple[str, str] | None = None,
    split: str = "test",
    max_positions: int = 4096,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Ablate rows of `layers` in the model of `cache`, and leave out whole blocks.

    `bases` are causal bases whose whole span is ablated, beside the `kinds` of `KINDS`. One
    position in `spacing` is changed, and read at offsets 0 to `offsets`. `passage` and `source` are
    numbers of sequences for the map of `patch_passage` (default: the first sequence of the split,
    ablated to the mean). Raises `UsageError` for what cannot be ablated, `MismatchError` for
    another model.
    """
    import torch

    chosen = choose_layers(cache, layers)
    named = _named_bases(cache, bases, chosen)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"there is no ablation {unknown[0]!r}; ablations are {', '.join(KINDS)}")
    if offsets < 0:
        raise UsageError(f"offsets must be 0 or more, not {offsets}")
    if tokens is not None and source is None and passage is None:
        raise UsageError("tokens are compared in a passage; give its sequence with --passage")
    runs = LayerRuns.prepare(
        cache,
        model,
        split=split,
        max_positions=max_positions,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    edited = spaced_positions(runs.sample, spacing, offsets)
    means = mean_rows(cache, sorted({*cache.layers}), seed)
    effects = Effects(runs.sample)
    blocks = [layer for layer in cache.layers if layer and layer - 1 in cache.layers]
    with show_stages(progress) as report:
        changes = {
            layer: _changes(runs, layer, kinds, named, means[layer], (spacing, offsets))
            for layer in chosen
        }
        done, total = 0, runs.sample.count * (len(chosen) + len(blocks))
        with torch.inference_mode():
            for batch in runs.batches():
                for layer in chosen:
                    _ablate(effects, batch, layer, changes[layer], edited, offsets)
                    done += len(batch.numbers)
                    if report is not None:
                        report("ablations", done, total)
                for layer in blocks:
                    _leave_out(effects, batch, layer, means[layer] - means[layer - 1])
                    done += len(batch.numbers)
                    if report is not None:
                        report("ablations", done, total)
        passage_map = patch_passage(
            cache,
            int(runs.sample.sequences[0]) if passage is None else passage,
            source,
            model=runs.model,
            tokens=tokens,
            layers=chosen,
            seed=seed,
            progress=progress_of_stage(report, "map"),
        )
    rows = _ablation_rows(effects, chosen, changes, offsets)
    block_rows = _block_rows(effects, blocks)
    undefined = effects.undefined([key for key in effects.changes if key[0] == "ablate"], edited)
    return StudyResult(
        study="patch",
        title=f"Ablated layers of {cache.manifest.model_name}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=int(edited.sum()),
            n_of="changed positions",
            units=runs.sample.units.name,
            n_units=runs.sample.units.count,
        ),
        tables=_tables(rows, block_rows, passage_map),
        figures=[_layer_figure(rows, block_rows), _map_figure(passage_map)],
        says=_sentences(rows, block_rows),
        does_not_say=NOT_SAID,
        notes=_notes(runs, chosen, undefined),
        settings={
            "kinds": list(kinds),
            "layers": chosen,
            "spacing": spacing,
            "offsets": offsets,
            "seed": seed,
            "max_positions": max_positions,
        },
    )


QUESTION = (
    "How much of what the model says depends on a single row of each layer, here and at the next "
    "positions, and how much on each whole block?"
)
METHOD = (
    "Rows come from the cache, one position in a fixed spacing is changed, and the model runs on "
    "from the layer (activation patching; Vig et al., 2004.12265; Meng et al., 2202.05262). A row "
    "becomes zero, the layer's mean, the row of another position, or the constant with the least "
    "KL (optimal ablation, Li and Janson, 2409.09951). A block is left out at all positions by "
    "giving layer l the rows of layer l - 1."
)
NOT_SAID = [
    "An ablated row is one that the model hardly ever sees; an effect shows that the row is read, "
    "not what it means.",
    "A small effect does not show that a layer is useless: other positions and layers may carry "
    "the same information.",
]


def _named_bases(cache: "ActivationCache", bases: Any, layers: list[int]) -> dict[str, Any]:
    """Causal bases by name; raises `UsageError` for probes of other kinds and layers."""
    named = dict(bases) if isinstance(bases, Mapping) else None
    if named is None:
        named = dict(zip(name_readouts(list(bases)), bases, strict=True)) if bases else {}
    for name, basis in named.items():
        of_layers = getattr(basis, "bases_", None)
        if of_layers is None:
            raise UsageError(
                f"{name} is no causal basis: only a basis has directions to ablate (residua fit "
                "basis); leave other probes out"
            )
        if not set(of_layers) & set(layers):
            raise UsageError(f"{name} has no basis of layers {layers}; give its --layers")
    return named


def _changes(
    runs: LayerRuns,
    layer: int,
    kinds: Sequence[str],
    bases: Mapping[str, Any],
    mean: np.ndarray,
    spaced: tuple[int, int],
) -> dict[str, RowChange]:
    """The changes of one layer by name."""
    changes: dict[str, RowChange] = {}
    for kind in kinds:
        if kind == "zero":
            changes[kind] = replace_by(np.zeros_like(mean))
        elif kind == "mean":
            changes[kind] = replace_by(mean)
        elif kind == "resample":
            changes[kind] = resample_rows(runs.sample, layer)
        else:
            sample = runs.sample
            train = LayerRuns.prepare(
                runs.cache,
                runs.model,
                split="train",
                max_positions=1024,
                seed=sample.seed,
                batch_tokens=512,
            )
            constant = fit_constant(train, layer, mean, spacing=spaced[0], reach=spaced[1])
            changes[kind] = replace_by(constant)
    for name, basis in bases.items():
        if layer in basis.bases_:
            changes[name] = remove_component(basis.bases_[layer])
    return changes


def _ablate(
    effects: Effects,
    batch: RunBatch,
    layer: int,
    changes: Mapping[str, RowChange],
    edited: np.ndarray,
    offsets: int,
) -> None:
    """Measure all changes of one layer at the edited positions of a batch."""
    places = np.flatnonzero(edited[batch.numbers])
    rows, clean = batch.rows(layer), batch.clean_logits(layer)
    for name, change in changes.items():
        changed = rows.clone()
        changed[places] = change(rows[places], batch.numbers[places])
        logits = batch.logits(layer, changed)
        add_offsets(effects, ("ablate", layer, name), batch, places, (clean, logits), offsets)


def add_offsets(
    effects: Effects,
    key: tuple[Any, ...],
    batch: RunBatch,
    places: np.ndarray,
    logits: "tuple[torch.Tensor, torch.Tensor]",
    offsets: int,
) -> None:
    """Measure a change at `places` of a batch by the predictions 0 to `offsets` positions later.

    `logits` are those of all rows before and after the change. The rows of a sequence are side by
    side, and all of `places` have that many rows of their sequence after them.
    """
    clean, changed = logits
    for offset in range(offsets + 1):
        read = places + offset
        effects.add(
            (*key, offset),
            batch.numbers[places],
            clean[read],
            changed[read],
            read_at=batch.numbers[read],
        )


def _leave_out(effects: Effects, batch: RunBatch, layer: int, mean_update: np.ndarray) -> None:
    """Measure the model without block `layer`, and with the mean of its updates in its place."""
    import torch

    clean = batch.clean_logits(layer)
    below = batch.rows(layer - 1)
    update = torch.from_numpy(mean_update.astype(np.float32)).to(below)
    effects.add(("deleted", layer), batch.numbers, clean, batch.logits(layer, below))
    effects.add(("mean", layer), batch.numbers, clean, batch.logits(layer, below + update))


def _ablation_rows(
    effects: Effects, layers: list[int], changes: Mapping[int, Mapping[str, Any]], offsets: int
) -> list[AblationRow]:
    rows = []
    for layer in layers:
        for kind in changes[layer]:
            for offset in range(offsets + 1):
                key = ("ablate", layer, kind, offset)
                kl, kl_interval = effects.mean(key, "kl")
                loss, loss_interval = effects.mean(key, "loss_change")
                rows.append(
                    AblationRow(
                        layer=layer,
                        kind=kind,
                        offset=offset,
                        n=effects.count(key),
                        kl=kl,
                        kl_interval=kl_interval,
                        loss_change=loss,
                        loss_change_interval=loss_interval,
                        flips=effects.mean(key, "flip")[0],
                    )
                )
    return rows


def _block_rows(effects: Effects, blocks: list[int]) -> list[BlockRow]:
    rows = []
    for block in blocks:
        for kind in ("deleted", "mean"):
            key = (kind, block)
            kl, kl_interval = effects.mean(key, "kl")
            loss, loss_interval = effects.mean(key, "loss_change")
            rows.append(
                BlockRow(
                    block=block,
                    kind=kind,
                    n=effects.count(key),
                    kl=kl,
                    kl_interval=kl_interval,
                    loss_change=loss,
                    loss_change_interval=loss_interval,
                    flips=effects.mean(key, "flip")[0],
                )
            )
    return rows


def _tables(
    rows: list[AblationRow], blocks: list[BlockRow], passage_map: PatchMap
) -> list[StudyTable]:
    measures = {
        "n": "n",
        "kl": "KL, nats",
        "kl_interval": "95 %",
        "loss_change": "CE change, nats",
        "loss_change_interval": "95 %",
        "flips": "top token changes",
    }
    names = {"layer": "layer", "kind": "ablation", "offset": "offset"}
    of_map = {
        "layer": "layer",
        "index": "index",
        "token": "token",
        "source_token": "token of the source",
        "kl": "KL, nats",
        "log_odds": "log-odds",
        "log_odds_change": "change",
    }
    return [
        StudyTable("ablations", "Single rows ablated", {**names, **measures}, rows),
        StudyTable(
            "blocks", "Blocks left out", {"block": "block", "kind": "kind", **measures}, blocks
        ),
        StudyTable("map", _map_title(passage_map), of_map, passage_map.cells, most_shown=0),
    ]


def _map_title(passage_map: PatchMap) -> str:
    change = (
        "ablated to the mean"
        if passage_map.source is None
        else f"replaced by that of sequence {passage_map.source}"
    )
    return f"One row of sequence {passage_map.sequence} {change}"


def _layer_figure(rows: list[AblationRow], blocks: list[BlockRow]) -> StudyFigure:
    panels = []
    for offset in sorted({row.offset for row in rows} & {0, 1}):
        kinds = dict.fromkeys(row.kind for row in rows)
        series = [
            _series(kind, [r for r in rows if (r.kind, r.offset) == (kind, offset)], "layer")
            for kind in kinds
        ]
        panels.append(Panel(f"Row ablated, read at offset {offset}", "layer", "KL, nats", series))
    bars = [
        _series(f"block {kind}", [r for r in blocks if r.kind == kind], "block")
        for kind in ("deleted", "mean")
    ]
    panels.append(Panel("Block left out everywhere", "block", "KL, nats", bars))
    return StudyFigure(
        "layers",
        "KL from the unchanged model to the model with one row ablated, at the changed position "
        "and the one after it, and with one block left out at all positions.",
        [panels],
    )


def _series(label: str, rows: Sequence[Any], field: str) -> Series:
    return Series(
        label,
        [getattr(row, field) for row in rows],
        [row.kl for row in rows],
        low=[row.kl_interval[0] for row in rows],
        high=[row.kl_interval[1] for row in rows],
    )


def _map_figure(passage_map: PatchMap) -> StudyFigure:
    layers = sorted({cell.layer for cell in passage_map.cells})
    indices = sorted({cell.index for cell in passage_map.cells})
    cell_at = {(cell.layer, cell.index): cell for cell in passage_map.cells}
    has_tokens = passage_map.tokens is not None

    def value(layer: int, index: int) -> float | None:
        cell = cell_at[layer, index]
        return cell.log_odds_change if has_tokens else cell.kl

    if passage_map.tokens is None:
        label = "KL, nats"
    else:
        first, second = passage_map.tokens
        label = f"change of log p({first}) - log p({second}), nats"
    tokens = {cell.index: cell.token for cell in passage_map.cells}
    panel = HeatPanel(
        title=_map_title(passage_map),
        x_label="position: token",
        y_label="layer",
        x_names=[f"{index}: {tokens[index]}" for index in indices],
        y_names=[str(layer) for layer in layers],
        values=[[value(layer, index) for index in indices] for layer in layers],
        color_label=label,
        diverging=has_tokens,
    )
    return StudyFigure(
        "map",
        f"Effect of one row on the prediction after position {passage_map.last}, by layer and "
        "position.",
        [[panel]],
    )


def _sentences(rows: list[AblationRow], blocks: list[BlockRow]) -> list[str]:
    says = []
    for kind in dict.fromkeys(row.kind for row in rows):
        for offset in (0, 1):
            known = [r for r in rows if r.kind == kind and r.offset == offset and r.kl is not None]
            if known:
                top = max(known, key=lambda row: row.kl or 0.0)
                says.append(
                    f"{kind} at offset {offset}: the largest KL is {_with_interval(top)} nats, at "
                    f"layer {top.layer} (n = {top.n})."
                )
    deleted = [r for r in blocks if r.kind == "deleted" and r.kl is not None]
    if deleted:
        top = max(deleted, key=lambda row: row.kl or 0.0)
        low = min(deleted, key=lambda row: row.kl or 0.0)
        says.append(
            f"Of whole blocks, the model misses block {top.block} most (KL {_with_interval(top)} "
            f"nats, n = {top.n}) and block {low.block} least ({_with_interval(low)})."
        )
    return says


def _with_interval(row: Any) -> str:
    low, high = row.kl_interval
    interval = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{row.kl:.3g}{interval}"


def _notes(runs: LayerRuns, layers: list[int], undefined: int) -> list[str]:
    notes = [note] if (note := runs.sample.units.note) else []
    not_resumed = [layer for layer in layers if not runs.is_resumed(layer)]
    if not_resumed:
        notes.append(
            f"The model cannot be resumed from layers {not_resumed}: all of its blocks ran, and "
            "the layer was overwritten."
        )
    if undefined:
        notes.append(f"{undefined} predictions are no distribution and do not count.")
    return notes
