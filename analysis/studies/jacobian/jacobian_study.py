"""A Jacobian lens beside the logit lens and fitted lenses: KL, precision ahead, tracked tokens.

The lens of Gurnee et al. (2026) reads J_l h, without a constant term; `centered` reads
J_l (h - mean_l) + mean_L. Whether J is what a regression of layer L on layer l finds (it would be
for Gaussian states, by Stein's identity) shows in the cosine of both matrices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval
from ....probes.lens.jacobian_lens import JacobianLens, check_shape
from ....probes.lens.logit_lens import LogitLens
from ....probes.ridge.ridge_probe import RidgeProbe
from ....probes.saved.save import check_belongs
from ...evaluation.probe_evaluation import evaluate
from ...evaluation.probe_names import describe_names, name_readouts
from ...evaluation.result import Evaluation
from ...token_texts.token_names import TokenNames, token_of_text
from ..results.study_figures import Panel, Series, StudyFigure
from ..results.study_result import StudyResult, StudySubject, StudyTable
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

QUESTION = (
    "What does the mean Jacobian of the model read in its layers, beside the logit lens and a map "
    "that was fitted?"
)
METHOD = (
    "The Jacobian lens (Gurnee et al. 2026) decodes J_l h with the head, J_l being the mean of "
    "d h_L / d h_l over prompts, of all later positions together; centered, it decodes "
    "J_l (h - mean_l) + mean_L with the means of the train split. KL(model || lens) is that of the "
    "next token (offset 0); precision@k at offset N is the share of positions whose k likeliest "
    "tokens hold the model's top token at t+N. Ranks are geometric means. Intervals (95 %) "
    "resample documents, of differences in pairs."
)
DOES_NOT_SAY = (
    "A Jacobian is a first-order effect at the states of its prompts: a high rank of a token does "
    "not show that the model will say it, nor that a lens with a smaller KL reads less.",
    "The precision at later offsets of a lens that says the same at every offset may be that of "
    "words which are frequent or repeated.",
)


@dataclass(frozen=True)
class JacobianRow:
    """One lens at one layer, next token; nats."""

    lens: str
    layer: int
    n: int
    kl: float | None
    kl_interval: Interval
    over_logit: float | None
    """Mean KL of the logit lens less that of this lens, in pairs."""
    over_logit_interval: Interval
    agreement: float | None
    """Share of positions with the model's top token on top."""
    agreement_interval: Interval
    rank: float | None
    """Geometric mean of the rank of the model's top token, 1 for the first."""
    rank_interval: Interval
    tracked_rank: float | None
    """Geometric mean of the rank of the tracked token; None without one."""
    tracked_rank_interval: Interval
    tracked_log_p: float | None
    """Mean log q of the tracked token."""


@dataclass(frozen=True)
class AheadRow:
    """How often a lens has the model's top token N tokens ahead among its likeliest."""

    lens: str
    layer: int
    offset: int
    n: int
    precision_at_1: float | None
    precision_at_1_interval: Interval
    precision_at_5: float | None
    precision_at_10: float | None
    kl: float | None
    kl_interval: Interval


@dataclass(frozen=True)
class MapCosineRow:
    """The matrix of a Jacobian lens beside that of a ridge lens."""

    lens: str
    ridge: str
    layer: int
    cosine: float | None
    """Cosine of both matrices as vectors, with the ridge map of offset 0."""
    cosine_of_sum: float | None
    """The same with the sum of the ridge maps of all its offsets, which J resembles: its effects
    are summed over later positions."""
    offsets: int
    """Number of offsets in the sum."""
    norm_ratio: float | None
    """Frobenius norm of J over that of the ridge map of offset 0."""


def study_jacobian(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout],
    *,
    track: str | int | None = None,
    offsets: Sequence[int] = (0, 1, 2, 3),
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Measure the Jacobian lenses among `lenses`, as published and centered, beside the others.

    The logit lens is always read. `track` is a token, as its text or id, whose rank is measured.
    Raises `UsageError` without a Jacobian lens, and `MismatchError` for a lens of another model.
    """
    given = name_readouts(lenses)
    jacobian = {name: lens for name, lens in given.items() if isinstance(lens, JacobianLens)}
    if not jacobian:
        raise UsageError(
            "give a Jacobian lens: a file .pt or .safetensors (residua.write_jacobian_lens, or a "
            "published one), or a probe that residua fit jacobian made"
        )
    for lens in jacobian.values():
        check_shape(lens, cache)
    for lens in given.values():
        check_belongs(lens, cache)
    readouts: dict[str, Readout] = {"logit": LogitLens.of(cache, tuple(offsets))}
    for name, lens in given.items():
        if isinstance(lens, JacobianLens):
            plain = lens.with_options(offsets=tuple(offsets), centered=False)
            readouts[str(name)] = plain
            readouts[f"{name} centered"] = (
                plain.with_options(centered=True) if lens.means_ else plain.with_means(cache)
            )
        else:
            readouts[str(name)] = lens
    tracked = None if track is None else find_token(cache, track)
    layers = sorted({layer for lens in jacobian.values() for layer in lens.layers})
    with show_stages(progress) as report:
        sample = choose_positions(cache, split, max_positions, seed)
        readings = measure_trajectories(
            sample,
            {name: lens for name, lens in readouts.items() if reads_offset_0(lens)},
            measures=("kl", "rank"),
            layers=layers,
            tracked=tracked,
            device=device,
            progress=progress_of_stage(report, "trajectories"),
        )
        evaluation = evaluate(
            cache,
            {name: lens for name, lens in readouts.items() if name != "logit"},
            split=split,
            offsets=tuple(offsets),
            layers=layers,
            max_positions=max_positions,
            seed=seed,
            device=device,
            progress=progress_of_stage(report, "evaluate"),
        )
    rows = [
        row for name, found in readings.items() for row in lens_rows(sample, name, found, readings)
    ]
    ahead = ahead_rows(evaluation, readouts)
    cosines = cosine_rows(readouts)
    label = None if tracked is None else TokenNames(cache)(tracked)
    undefined = sum(found.undefined for found in readings.values())
    return StudyResult(
        study="jacobian",
        title=f"Jacobian lens of {cache.manifest.model_name.rstrip('/').rpartition('/')[2]}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=sample.count,
            n_of="positions",
            units=sample.units.name,
            n_units=sample.units.count,
            probes={str(name): describe_lens(lens) for name, lens in given.items()},
        ),
        tables=[
            StudyTable("lenses", "Next token, by layer", lens_headings(label), rows),
            StudyTable("ahead", "Tokens ahead, by layer", AHEAD_HEADINGS, ahead),
            StudyTable("maps", "Jacobians beside ridge maps", MAP_HEADINGS, cosines),
        ],
        figures=[draw_lenses(rows, cosines, label), draw_ahead(ahead)],
        says=describe_jacobian(sample, readings, readouts, ahead, cosines),
        does_not_say=DOES_NOT_SAY,
        notes=[
            *([sample.units.note] if sample.units.note else []),
            *(
                [f"{undefined:,} readings have logits that are no distribution"]
                if undefined
                else []
            ),
            *describe_names(given),
        ],
        settings={
            "max_positions": max_positions,
            "seed": seed,
            "offsets": list(offsets),
            "track": label,
        },
    )


AHEAD_HEADINGS = {
    "lens": "lens",
    "layer": "layer",
    "offset": "N",
    "n": "n",
    "precision_at_1": "precision@1",
    "precision_at_1_interval": "95 %",
    "precision_at_5": "precision@5",
    "precision_at_10": "precision@10",
}
MAP_HEADINGS = {
    "lens": "Jacobian",
    "ridge": "ridge",
    "layer": "layer",
    "cosine": "cosine, N = 0",
    "cosine_of_sum": "with sum over N",
    "offsets": "of offsets",
    "norm_ratio": "norm ratio",
}


def lens_headings(tracked: str | None) -> dict[str, str]:
    """Headings of the table of lenses, with those of a tracked token."""
    headings = {
        "lens": "lens",
        "layer": "layer",
        "n": "n",
        "kl": "KL, nats",
        "kl_interval": "95 %",
        "over_logit": "less than logit lens",
        "over_logit_interval": "95 %",
        "agreement": "same top token",
        "rank": "rank of model's top",
        "rank_interval": "95 %",
    }
    if tracked is not None:
        headings |= {
            "tracked_rank": f"rank of {tracked}",
            "tracked_rank_interval": "95 %",
            "tracked_log_p": f"log q of {tracked}",
        }
    return headings


def find_token(cache: "ActivationCache", track: str | int) -> int:
    """Id of the token to track; raises `UsageError` unless `track` is one token."""
    if isinstance(track, str):
        names = TokenNames(cache)
        if names.tokenizer is None:
            raise UsageError("this cache has no tokenizer: track a token by its id")
        return token_of_text(track, names.tokenizer, names)
    if not 0 <= track < cache.vocab:
        raise UsageError(f"there is no token {track} in a vocabulary of {cache.vocab:,}")
    return track


def reads_offset_0(lens: Readout) -> bool:
    """Whether a lens reads a layer at offset 0."""
    return any(layer is not None and offset == 0 for layer, offset in lens.pairs())


def describe_lens(lens: Readout) -> str:
    """What a lens is; of a Jacobian lens what its means are of."""
    if not isinstance(lens, JacobianLens):
        return repr(lens)
    counts = {"prompts": lens.n_prompts_, "positions": lens.n_positions_}
    known = [f"{count:,} {name}" for name, count in counts.items() if count]
    return f"Jacobians of {len(lens.layers)} layers{', of ' + ' and '.join(known) if known else ''}"


def lens_rows(
    sample: PositionSample, name: str, found: Trajectories, readings: Mapping[str, Trajectories]
) -> list[JacobianRow]:
    """Rows of one lens, by layer below the last."""
    none: tuple[float | None, Interval] = (None, (None, None))
    logit, rows = readings["logit"], []
    for column, layer in enumerate(found.layers[:-1]):
        kl, rank = found.values["kl"][:, column], found.values["rank"][:, column]
        over = none
        if name != "logit":
            over = sample.mean(logit.values["kl"][:, logit.column(layer)] - kl)
        tracked, log_p = none, None
        if "tracked_rank" in found.values:
            tracked = geometric_mean(sample, found.values["tracked_rank"][:, column])
            log_p = sample.mean(found.values["tracked_log_p"][:, column])[0]
        means = sample.mean(kl), sample.mean(np.where(np.isnan(rank), np.nan, rank == 1))
        ranks = geometric_mean(sample, rank)
        rows.append(
            JacobianRow(
                lens=name,
                layer=layer,
                n=int((~np.isnan(kl)).sum()),
                kl=means[0][0],
                kl_interval=means[0][1],
                over_logit=over[0],
                over_logit_interval=over[1],
                agreement=means[1][0],
                agreement_interval=means[1][1],
                rank=ranks[0],
                rank_interval=ranks[1],
                tracked_rank=tracked[0],
                tracked_rank_interval=tracked[1],
                tracked_log_p=log_p,
            )
        )
    return rows


def geometric_mean(sample: PositionSample, ranks: np.ndarray) -> tuple[float | None, Interval]:
    """Geometric mean of ranks, with its interval over documents."""
    mean, (low, high) = sample.mean(np.log(ranks.astype(np.float64)))
    if mean is None:
        return None, (None, None)
    interval = (None, None) if low is None or high is None else (np.exp(low), np.exp(high))
    return float(np.exp(mean)), interval


def ahead_rows(evaluation: Evaluation, readouts: Mapping[str, Readout]) -> list[AheadRow]:
    """Rows of the lenses in an evaluation, without its bigram."""
    return [
        AheadRow(
            lens=str(row.probe),
            layer=row.layer,
            offset=row.offset,
            n=row.n,
            precision_at_1=row.precision_at_1,
            precision_at_1_interval=(row.precision_at_1_low, row.precision_at_1_high),
            precision_at_5=row.precision_at_5,
            precision_at_10=row.precision_at_10,
            kl=row.kl,
            kl_interval=(row.kl_low, row.kl_high),
        )
        for row in evaluation.rows
        if row.layer is not None and str(row.probe) in readouts
    ]


def cosine_rows(readouts: Mapping[str, Readout]) -> list[MapCosineRow]:
    """Rows for each Jacobian lens as published and each ridge lens of the last layer."""
    rows = []
    for name, lens in readouts.items():
        if not isinstance(lens, JacobianLens) or lens.centered:
            continue
        for ridge_name, ridge in readouts.items():
            if not isinstance(ridge, RidgeProbe):
                continue
            for layer in lens.layers:
                maps = {
                    offset: affine.weight.T.astype(np.float64)
                    for of_layer, offset in ridge.pairs()
                    if of_layer == layer
                    and (affine := ridge.residual_map(layer, offset)) is not None
                }
                if 0 not in maps:
                    continue
                jacobian, total = lens.jacobians_[layer], sum(maps.values())
                norm = float(np.linalg.norm(maps[0]))
                rows.append(
                    MapCosineRow(
                        lens=name,
                        ridge=ridge_name,
                        layer=layer,
                        cosine=matrix_cosine(jacobian, maps[0]),
                        cosine_of_sum=matrix_cosine(jacobian, np.asarray(total)),
                        offsets=len(maps),
                        norm_ratio=float(np.linalg.norm(jacobian)) / norm if norm else None,
                    )
                )
    return rows


def matrix_cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cosine of two matrices as vectors; None where one is 0."""
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a.astype(np.float64), b)) / norms if norms else None


def draw_lenses(
    rows: Sequence[JacobianRow], cosines: Sequence[MapCosineRow], tracked: str | None
) -> StudyFigure:
    """KL by layer, ranks by layer, and the cosine with ridge maps where there are any."""

    def panel(measure: str, title: str, y_label: str, log_y: bool = False) -> Panel:
        series = []
        for lens in dict.fromkeys(row.lens for row in rows):
            curve = [row for row in rows if row.lens == lens]
            ends = [getattr(row, f"{measure}_interval") for row in curve]
            series.append(
                Series(
                    lens,
                    [row.layer for row in curve],
                    [getattr(row, measure) for row in curve],
                    [low for low, _ in ends],
                    [high for _, high in ends],
                    dash="dash" if lens.endswith(" centered") else "solid",
                )
            )
        return Panel(title, "layer", y_label, series, (None if log_y else 0, None), log_y=log_y)

    n = f"n = {max((row.n for row in rows), default=0):,}"
    panels = [
        panel("kl", f"Distance to the model, {n}", "KL(model || lens), nats"),
        panel("rank", f"Rank of the model's top token, {n}", "geometric mean of ranks", log_y=True),
    ]
    if tracked is not None:
        panels.append(panel("tracked_rank", f"Rank of {tracked}", "geometric mean of ranks", True))
    if cosines:
        lines = []
        for lens, ridge in dict.fromkeys((row.lens, row.ridge) for row in cosines):
            of_pair = [row for row in cosines if (row.lens, row.ridge) == (lens, ridge)]
            layers = [row.layer for row in of_pair]
            lines.append(Series(f"{lens}, {ridge}", layers, [row.cosine for row in of_pair]))
            if of_pair[0].offsets > 1:
                sums = [row.cosine_of_sum for row in of_pair]
                label = f"{lens}, sum of {ridge} over N"
                lines.append(Series(label, layers, sums, dash="dash"))
        panels.append(Panel("Jacobian beside ridge map", "layer", "cosine", lines, (None, 1)))
    return StudyFigure(
        "lenses",
        "KL to the model and rank of the model's top token by layer; broken lines have the means "
        "corrected.",
        [panels],
    )


def draw_ahead(rows: Sequence[AheadRow]) -> StudyFigure:
    """Precision@1 by layer, a panel for each offset."""
    panels = []
    for offset in sorted({row.offset for row in rows}):
        series = []
        for lens in dict.fromkeys(row.lens for row in rows):
            curve = [row for row in rows if (row.lens, row.offset) == (lens, offset)]
            if curve:
                series.append(
                    Series(
                        lens,
                        [row.layer for row in curve],
                        [row.precision_at_1 for row in curve],
                        [row.precision_at_1_interval[0] for row in curve],
                        [row.precision_at_1_interval[1] for row in curve],
                        dash="dash" if lens.endswith(" centered") else "solid",
                    )
                )
        n = max(row.n for row in rows if row.offset == offset)
        title = f"N = {offset}, n = {n:,}"
        panels.append(Panel(title, "layer", "precision@1", series, (0, None)))
    return StudyFigure(
        "ahead",
        "How often the lens's top token is the model's top token N tokens ahead.",
        [panels],
    )


def describe_jacobian(
    sample: PositionSample,
    readings: Mapping[str, Trajectories],
    readouts: Mapping[str, Readout],
    ahead: Sequence[AheadRow],
    cosines: Sequence[MapCosineRow],
) -> list[str]:
    """Sentences about the numbers."""
    says = []
    published = [
        name
        for name, lens in readouts.items()
        if isinstance(lens, JacobianLens) and not lens.centered
    ]
    for name in published:
        centered = f"{name} centered"
        says.append(_compared(sample, readings, centered, name))
        for other, lens in readouts.items():
            if other == "logit" or (not isinstance(lens, JacobianLens) and other in readings):
                says.append(_compared(sample, readings, centered, other))
    for offset in sorted({row.offset for row in ahead} - {0}):
        at_offset = [
            row for row in ahead if row.offset == offset and row.precision_at_1 is not None
        ]
        best = {
            name: max(
                (row for row in at_offset if row.lens == name),
                key=lambda row: row.precision_at_1 or 0,
                default=None,
            )
            for name in readouts
        }
        parts = [
            f"{name} {row.precision_at_1:.3f} (layer {row.layer})"
            for name, row in best.items()
            if row is not None
        ]
        n = max((row.n for row in at_offset), default=0)
        says.append(f"Precision@1 at N = {offset}, best layer, n = {n:,}: {', '.join(parts)}.")
    for lens, ridge in dict.fromkeys((row.lens, row.ridge) for row in cosines):
        values = [
            f"{row.cosine:.2f}"
            for row in cosines
            if (row.lens, row.ridge) == (lens, ridge) and row.cosine is not None
        ]
        says.append(
            f"The cosine of {lens} with the maps of {ridge} is {', '.join(values)} from the first "
            "layer to the last: 1 would be the same matrix but for scale."
        )
    return says


def _compared(
    sample: PositionSample, readings: Mapping[str, Trajectories], name: str, other: str
) -> str:
    """How much less the KL of a lens is than that of another, over the layers that both read."""
    layers = sorted(set(readings[name].layers[:-1]) & set(readings[other].layers[:-1]))
    if not layers:
        return f"{name} and {other} read no layer in common."
    kl = [
        readings[lens].values["kl"][:, [readings[lens].column(layer) for layer in layers]].mean(1)
        for lens in (name, other)
    ]
    difference, (low, high) = sample.mean(kl[1] - kl[0])
    if difference is None:
        return f"{name} and {other} have no position in common where both are defined."
    where = f"mean over {len(layers)} layers, n = {sample.count:,}"
    if low is None or high is None:
        return (
            f"{name} and {other} differ in KL by {difference:+.3f}, without an interval ({where})."
        )
    if low <= 0 <= high:
        return f"No clear difference between {name} and {other} in KL ({difference:+.3f}; {where})."
    word = "less" if difference > 0 else "more"
    return (
        f"The KL of {name} is {abs(difference):.3f} nats {word} than that of {other} "
        f"[{min(abs(low), abs(high)):.3f}, {max(abs(low), abs(high)):.3f}] ({where})."
    )
