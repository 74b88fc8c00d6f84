"""What erasing information on later tokens does to later predictions: `study_erasure`.

At one position in `spacing`, the subspace of a layer that tells of the prediction N steps later
(`future_subspaces.py`) is erased, and the model runs on. If the model used it, the loss N steps
later grows more than after controls of equal rank and of equal removed variance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Auto, StageProgress, show_stages
from ...probes.base.resampling import Interval
from ..studies.results.study_figures import Panel, Series, StudyFigure
from ..studies.results.study_result import StudyResult, StudySubject, StudyTable
from ..studies.trajectories.position_sample import choose_positions
from .effects import Effects
from .future_subspaces import FutureMoments, FutureSubspace, find_subspaces, readout_weights
from .layer_runs import MEAN_POSITIONS, LayerRuns, choose_layers, spaced_positions
from .patch_study import add_offsets
from .row_changes import remove_component

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

CONTROLS = ("random", "PCA", "random, variance", "PCA, variance")


@dataclass(frozen=True)
class ErasureRow:
    """Effect of erasing one subspace of one layer, on the prediction `offset` positions later."""

    layer: int
    subspace: str
    """`future N`, `next step`, or one of the controls."""
    k: int
    """Directions."""
    removed_variance: float
    """Share of the variance of the layer's rows."""
    offset: int
    n: int
    loss_change: float | None
    """Mean change of the cross-entropy of the text's next token, nats."""
    loss_change_interval: Interval
    kl: float | None
    """Mean KL(unchanged || erased), nats."""
    kl_interval: Interval
    flips: float | None


@dataclass(frozen=True)
class ContrastRow:
    """A future subspace against a control, at the offset that it was found for."""

    layer: int
    offset: int
    """N."""
    control: str
    n: int
    loss_difference: float | None
    """Change of the cross-entropy with the future subspace erased, less that with the control."""
    loss_difference_interval: Interval
    kl_difference: float | None
    kl_difference_interval: Interval


def study_erasure(
    cache: "ActivationCache",
    lenses: Any = (),
    *,
    model: "ResumableModel | torch.nn.Module | str | Path | None" = None,
    layers: Any = None,
    k: int = 4,
    offsets: int = 3,
    spacing: int = 16,
    split: str = "test",
    max_positions: int = 4096,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Erase the future subspaces of `k` directions of each of `layers`, and controls.

    The subspaces come from rows of the train split, effects from one position in `spacing` of
    `split`, read at offsets 0 to `offsets`. `lenses` must be empty: the subspaces need none. Raises
    `UsageError` for `k` and `offsets` that the cache does not allow, `MismatchError` for another
    model.
    """
    import torch

    if len(lenses):
        raise UsageError("the subspaces come from the rows of the cache: leave probes out")
    if k < 1 or 2 * k > cache.d_model:
        raise UsageError(f"k must be 1 to {cache.d_model // 2}, half of d_model, not {k}")
    if offsets < 1:
        raise UsageError(f"offsets must be 1 or more, the steps ahead, not {offsets}")
    chosen = choose_layers(cache, layers)
    cache.residual_array(cache.n_blocks)  # raises NotFoundError: its rows are the targets
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
    weights = readout_weights(cache)
    train = choose_positions(cache, "train", MEAN_POSITIONS, seed)
    subspaces: dict[int, list[FutureSubspace]] = {}
    effects = Effects(runs.sample)
    with show_stages(progress) as report:
        for number, layer in enumerate(chosen):
            moments = FutureMoments.collect(train, layer, range(offsets + 1))
            subspaces[layer] = find_subspaces(moments, weights, k, seed)
            if report is not None:
                report("subspaces", number + 1, len(chosen))
        done, total = 0, runs.sample.count * len(chosen)
        with torch.inference_mode():
            for batch in runs.batches():
                places = np.flatnonzero(edited[batch.numbers])
                for layer in chosen:
                    rows, clean = batch.rows(layer), batch.clean_logits(layer)
                    for subspace in subspaces[layer]:
                        change = remove_component(subspace.layer_basis())
                        changed = rows.clone()
                        changed[places] = change(rows[places], batch.numbers[places])
                        logits = batch.logits(layer, changed)
                        key = (layer, subspace.name)
                        add_offsets(effects, key, batch, places, (clean, logits), offsets)
                    done += len(batch.numbers)
                    if report is not None:
                        report("erasures", done, total)
    rows = _rows(effects, subspaces, offsets)
    contrasts = _contrasts(effects, chosen, offsets)
    undefined = effects.undefined(effects.changes, edited)
    notes = [note] if (note := runs.sample.units.note) else []
    notes.append(
        f"Positions of a sequence are changed {spacing} apart in one run: a prediction may also "
        "feel changes further back."
    )
    if not_resumed := [layer for layer in chosen if not runs.is_resumed(layer)]:
        notes.append(f"All blocks ran for layers {not_resumed}: the model cannot be resumed there.")
    if undefined:
        notes.append(f"{undefined} predictions are no distribution and do not count.")
    if cache.head.kind != "explicit":
        notes.append("The head has no plain unembedding: directions of the last layer count alike.")
    return StudyResult(
        study="erase",
        title=f"Erased information on later tokens in {cache.manifest.model_name}",
        question=(
            "Does the model use what its states tell of predictions several steps ahead, beyond "
            "what they tell of the next one?"
        ),
        method=(
            "The future subspace of N is spanned by the directions of whitened rows with the "
            "largest covariance with layer L at t + N, what layer L at t explains partialled out, "
            "orthogonal to the directions of the next step. It is erased at single positions as "
            "LEACE does (Belrose et al., 2306.03819), so that the rest of the row stays where the "
            "model has seen rows, and the model runs on; controls are random and principal "
            "directions, of equal number and of equal removed variance."
        ),
        subject=StudySubject.of(
            cache,
            split,
            n=int(edited.sum()),
            n_of="changed positions",
            units=runs.sample.units.name,
            n_units=runs.sample.units.count,
        ),
        tables=[
            StudyTable("contrasts", "Future subspaces against controls", CONTRASTS, contrasts),
            StudyTable("erasures", "Every subspace at every offset", HEADINGS, rows),
        ],
        figures=[_figure(rows, offsets), _layers_figure(rows, offsets)],
        says=[_sentence(layer, contrasts, rows) for layer in chosen],
        does_not_say=[
            "What a linear subspace holds is not all that a layer tells of later tokens, and other "
            "positions may tell the same: no effect is no proof that the model does not plan.",
            "Of many contrasts some are clear by chance: intervals are not corrected for their "
            "number.",
            "A larger loss at t + N shows that the state at t is read later, not that the model "
            "computed it for that purpose.",
        ],
        notes=notes,
        settings={
            "layers": chosen,
            "k": k,
            "offsets": offsets,
            "spacing": spacing,
            "seed": seed,
            "max_positions": max_positions,
        },
    )


HEADINGS = {
    "layer": "layer",
    "subspace": "subspace",
    "k": "k",
    "removed_variance": "variance removed",
    "offset": "offset",
    "n": "n",
    "loss_change": "CE change, nats",
    "loss_change_interval": "95 %",
    "kl": "KL, nats",
    "kl_interval": "95 %",
    "flips": "top token changes",
}
CONTRASTS = {
    "layer": "layer",
    "offset": "N",
    "control": "control",
    "n": "n",
    "loss_difference": "CE difference, nats",
    "loss_difference_interval": "95 %",
    "kl_difference": "KL difference, nats",
    "kl_difference_interval": "95 %",
}


def _rows(
    effects: Effects, subspaces: Mapping[int, list[FutureSubspace]], offsets: int
) -> list[ErasureRow]:
    rows = []
    for layer, of_layer in subspaces.items():
        for subspace in of_layer:
            for offset in range(offsets + 1):
                key = (layer, subspace.name, offset)
                loss, loss_interval = effects.mean(key, "loss_change")
                kl, kl_interval = effects.mean(key, "kl")
                rows.append(
                    ErasureRow(
                        layer=layer,
                        subspace=subspace.name,
                        k=subspace.k,
                        removed_variance=subspace.removed_variance,
                        offset=offset,
                        n=effects.count(key),
                        loss_change=loss,
                        loss_change_interval=loss_interval,
                        kl=kl,
                        kl_interval=kl_interval,
                        flips=effects.mean(key, "flip")[0],
                    )
                )
    return rows


def _contrasts(effects: Effects, layers: list[int], offsets: int) -> list[ContrastRow]:
    rows = []
    for layer in layers:
        for offset in range(1, offsets + 1):
            key = (layer, f"future {offset}", offset)
            for control in CONTROLS:
                other = (layer, control, offset)
                loss, loss_interval = effects.mean_difference(key, other, "loss_change")
                kl, kl_interval = effects.mean_difference(key, other, "kl")
                rows.append(
                    ContrastRow(
                        layer=layer,
                        offset=offset,
                        control=control,
                        n=effects.count(key),
                        loss_difference=loss,
                        loss_difference_interval=loss_interval,
                        kl_difference=kl,
                        kl_difference_interval=kl_interval,
                    )
                )
    return rows


def _figure(rows: list[ErasureRow], offsets: int) -> StudyFigure:
    """KL by offset, of the subspaces of the layer with the largest effect of a future subspace."""

    def effect(row: ErasureRow) -> float:
        is_own = row.subspace == f"future {row.offset}"
        return row.kl if is_own and row.kl is not None else -1.0

    layer = max(rows, key=effect).layer
    panels = []
    for measure, label in (("kl", "KL, nats"), ("loss_change", "CE change, nats")):
        series = []
        for name in dict.fromkeys(row.subspace for row in rows):
            of_name = [row for row in rows if (row.layer, row.subspace) == (layer, name)]
            intervals = [getattr(row, f"{measure}_interval") for row in of_name]
            series.append(
                Series(
                    name,
                    [row.offset for row in of_name],
                    [getattr(row, measure) for row in of_name],
                    low=[low for low, _ in intervals],
                    high=[high for _, high in intervals],
                    dash="solid" if name.startswith("future") else "dash",
                )
            )
        title = f"Layer {layer}: subspace erased at t"
        panels.append(Panel(title, "read at t + offset", label, series))
    return StudyFigure(
        "offsets",
        f"Effect at t to t + {offsets} of erasing a subspace of layer {layer} at t; controls are "
        "dashed.",
        [panels],
    )


def _layers_figure(rows: list[ErasureRow], offsets: int) -> StudyFigure:
    panels = []
    for offset in range(1, offsets + 1):
        series = []
        for name in (f"future {offset}", "next step", *CONTROLS):
            own = [row for row in rows if (row.subspace, row.offset) == (name, offset)]
            series.append(
                Series(
                    "future subspace of N" if name.startswith("future") else name,
                    [row.layer for row in own],
                    [row.kl for row in own],
                    low=[row.kl_interval[0] for row in own],
                    high=[row.kl_interval[1] for row in own],
                    dash="solid" if name.startswith("future") else "dash",
                )
            )
        panels.append(Panel(f"N = {offset}", "layer", "KL at t + N, nats", series))
    return StudyFigure("layers", "KL at t + N by the layer of the erasure.", [panels])


def _sentence(layer: int, contrasts: list[ContrastRow], rows: list[ErasureRow]) -> str:
    """At which offsets the future subspace matters more than the control of equal variance."""
    parts = []
    for row in contrasts:
        low, high = row.kl_difference_interval
        if row.layer != layer or row.control != "PCA, variance" or row.kl_difference is None:
            continue
        own = next(
            r
            for r in rows
            if (r.layer, r.subspace, r.offset) == (layer, f"future {row.offset}", row.offset)
        )
        if low is None or high is None:
            verdict = "difference without an interval"
        elif low > 0:
            verdict = f"more than the control by {row.kl_difference:.3g} [{low:.3g}, {high:.3g}]"
        elif high < 0:
            verdict = f"less than the control by {-row.kl_difference:.3g} [{-high:.3g}, {-low:.3g}]"
        else:
            verdict = f"no clear difference from the control [{low:.3g}, {high:.3g}]"
        parts.append(f"N = {row.offset}: KL {own.kl:.3g}, {verdict}")
    n = next((row.n for row in contrasts if row.layer == layer), 0)
    return (
        f"Layer {layer}, principal axes of equal number and removed variance as control, in nats: "
        + "; ".join(parts)
        + f" (n = {n})."
    )
