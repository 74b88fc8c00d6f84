"""Early exit: how many layers are saved if a confident lens speaks for the model.

`study_early_exit` stops at the first layer where a lens gives its top token more than a threshold
of probability, and takes that token; positions without such a layer run to the end. It reads a
cache alone. Confident adaptive language modeling (Schuster et al., 2207.07061) exits so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ...probes.base.readout import Readout
from ...probes.base.resampling import Interval
from ...probes.lens.logit_lens import LogitLens
from ..evaluation.probe_names import name_readouts
from ..studies.results.study_figures import Panel, Series, StudyFigure
from ..studies.results.study_result import StudyResult, StudySubject, StudyTable
from ..studies.trajectories.position_sample import PositionSample, choose_positions
from ..studies.trajectories.readings import Trajectories, measure_trajectories

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
MEASURES = ("max_probability", "cross_entropy")
MATCH = 0.95
"""Share of the model's top tokens that the sentences ask for."""


@dataclass(frozen=True)
class ExitRow:
    """Exits of one lens at one threshold."""

    lens: str
    threshold: float
    n: int
    layers_run: float
    """Mean number of blocks that run, of L."""
    saved: float
    """Mean share of blocks that do not run."""
    saved_interval: Interval
    agreement: float
    """Share of positions whose token is the model's top token."""
    agreement_interval: Interval
    exits: float
    """Share of positions that stop below the last layer."""
    agreement_of_exits: float | None
    """Agreement among these; None without any."""
    loss_change: float | None
    """Mean cross-entropy of the text's next token under the exit's distribution, less the model's,
    in nats."""
    loss_change_interval: Interval


def study_early_exit(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
    sample: PositionSample | None = None,
    readings: Mapping[str, Trajectories] | None = None,
) -> StudyResult:
    """Measure blocks saved and agreement with the model, by lens and threshold of confidence.

    The logit lens is always among the lenses. The time of the lens itself is not counted: one head
    per layer that is asked. Raises `UsageError` for thresholds outside (0, 1).
    """
    if not thresholds or not all(0 < value < 1 for value in thresholds):
        raise UsageError(f"thresholds are probabilities between 0 and 1, not {list(thresholds)}")
    if sample is None:
        sample = choose_positions(cache, split, max_positions, seed)
    if readings is None:
        named = name_readouts(lenses, [LogitLens.of(cache, 0)])
        with show_stages(progress) as report:
            readings = measure_trajectories(
                sample,
                named,
                measures=MEASURES,
                device=device,
                progress=progress_of_stage(report, "trajectories"),
            )
    rows = [
        exit_row(sample, lens, threshold, cache.n_blocks)
        for lens in readings.values()
        for threshold in sorted(thresholds)
    ]
    undefined = sum(lens.undefined for lens in readings.values())
    notes = [note] if (note := sample.units.note) else []
    if undefined:
        notes.append(f"{undefined} readings are no distribution; no position exits there.")
    return StudyResult(
        study="exit",
        title=f"Early exit of {cache.manifest.model_name}",
        question="How many blocks need not run if a lens that is confident speaks for the model?",
        method=(
            "At each position the layers are read in order, and the first one at which the lens "
            "gives its top token at least the threshold of probability decides; otherwise the "
            "model does (CALM, Schuster et al., 2207.07061). Blocks saved are those above. The "
            "agreement is with the model's own top token."
        ),
        subject=StudySubject.of(
            cache,
            sample.split,
            n=sample.count,
            n_of="positions",
            units=sample.units.name,
            n_units=sample.units.count,
        ),
        tables=[StudyTable("exits", "Exits by lens and threshold", HEADINGS, rows)],
        figures=[_figure(rows)],
        says=[_sentence(name, rows) for name in readings],
        does_not_say=[
            "Blocks saved are no time saved: the lens itself reads the head at every layer asked, "
            "and a generating model still needs the states of skipped layers for later tokens.",
            "The threshold is not calibrated: its agreement on other texts may differ.",
        ],
        notes=notes,
        settings={"thresholds": sorted(thresholds), "seed": seed, "max_positions": max_positions},
    )


HEADINGS = {
    "lens": "lens",
    "threshold": "threshold",
    "n": "n",
    "layers_run": "blocks run",
    "saved": "share saved",
    "saved_interval": "95 %",
    "agreement": "agreement",
    "agreement_interval": "95 %",
    "exits": "early exits",
    "agreement_of_exits": "their agreement",
    "loss_change": "CE change, nats",
    "loss_change_interval": "95 %",
}


def exit_columns(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Column of the exit of each position, `(n,)`: the first above the threshold, or the last one.

    `confidence` `(n, layers)` is the largest probability; NaN never exits.
    """
    with np.errstate(invalid="ignore"):
        confident = confidence >= threshold
    confident[:, -1] = True
    return confident.argmax(1)


def exit_row(sample: PositionSample, lens: Trajectories, threshold: float, depth: int) -> ExitRow:
    """The exits of one lens at one threshold."""
    columns = exit_columns(lens.values["max_probability"].copy(), threshold)
    numbers = np.arange(sample.count)
    layers = np.asarray(lens.layers)[columns]
    agrees = (lens.top[numbers, columns] == lens.top[:, -1]).astype(np.float64)
    agrees[lens.top[:, -1] < 0] = np.nan
    early = columns < len(lens.layers) - 1
    loss = lens.values["cross_entropy"]
    change = loss[numbers, columns] - loss[:, -1]
    saved, saved_interval = sample.mean(1 - layers / depth)
    agreement, agreement_interval = sample.mean(agrees)
    loss_change, loss_interval = sample.mean(change)
    of_exits = agrees[early & ~np.isnan(agrees)]
    return ExitRow(
        lens=lens.lens,
        threshold=threshold,
        n=sample.count,
        layers_run=float(layers.mean()),
        saved=saved or 0.0,
        saved_interval=saved_interval,
        agreement=float("nan") if agreement is None else agreement,
        agreement_interval=agreement_interval,
        exits=float(early.mean()),
        agreement_of_exits=float(of_exits.mean()) if len(of_exits) else None,
        loss_change=loss_change,
        loss_change_interval=loss_interval,
    )


def _figure(rows: list[ExitRow]) -> StudyFigure:
    def series(lens: str, measure: str) -> Series:
        of_lens = [row for row in rows if row.lens == lens]
        intervals = [getattr(row, f"{measure}_interval") for row in of_lens]
        return Series(
            lens,
            [row.saved for row in of_lens],
            [getattr(row, measure) for row in of_lens],
            low=[low for low, _ in intervals],
            high=[high for _, high in intervals],
            names=[f"threshold {row.threshold:g}" for row in of_lens],
        )

    lenses = list(dict.fromkeys(row.lens for row in rows))
    panels = [
        Panel(
            "Agreement with the model",
            "share of blocks saved",
            "share of top tokens",
            [series(lens, "agreement") for lens in lenses],
            y_range=(None, 1.0),
        ),
        Panel(
            "Loss",
            "share of blocks saved",
            "CE change, nats",
            [series(lens, "loss_change") for lens in lenses],
            reference=0.0,
            reference_label="the model",
        ),
    ]
    return StudyFigure(
        "exit", "Blocks saved against agreement and loss; a point for each threshold.", [panels]
    )


def _sentence(lens: str, rows: list[ExitRow]) -> str:
    good = [row for row in rows if row.lens == lens and row.agreement >= MATCH]
    if not good:
        best = max((row for row in rows if row.lens == lens), key=_agreement)
        return (
            f"{lens}: no threshold keeps {MATCH:.0%} of the model's top tokens; at "
            f"{best.threshold:g} it keeps {best.agreement:.1%} and saves {best.saved:.1%} of the "
            f"blocks (n = {best.n})."
        )
    best = max(good, key=lambda row: row.saved)
    low, high = best.saved_interval
    interval = "" if low is None or high is None else f" [{low:.1%}, {high:.1%}]"
    return (
        f"{lens}: threshold {best.threshold:g} saves {best.saved:.1%}{interval} of the blocks and "
        f"keeps {best.agreement:.1%} of the model's top tokens (n = {best.n})."
    )


def _agreement(row: Any) -> float:
    return -1.0 if np.isnan(row.agreement) else row.agreement
