"""Several models by relative depth: how well the logit lens and fitted lenses read each of them.

The logit lens fails in models such as GPT-Neo, BLOOM and OPT (Belrose et al., 2303.08112): early
layers give the input token back, or a distribution that is worse than one that knows no context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import MismatchError
from ....cache.format.manifest import SHORT_ID
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.probe_names import describe_names, name_readouts
from ..results.study_figures import Panel, Series, StudyFigure
from ..results.study_result import StudyResult, StudySubject, StudyTable
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories
from .divergence_figures import format_interval
from .lens_pairs import caches_of
from .two_models import model_label

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

MEASURED = ("kl", "rank", "entropy", "cross_entropy")
QUESTION = (
    "At which relative depth do lenses read the predictions of each model, and where does the "
    "logit lens fail?"
)
METHOD = (
    "At each layer l of L, a lens's distribution is compared with the model's own (KL in nats, and "
    "how often the top tokens agree), over relative depth l / L, as in 2303.08112. A constant "
    "distribution, the mean of the model's own over these positions, is the yardstick: the lens "
    "fails at a layer whose KL is above that of this constant, with its whole 95 % interval. The "
    "input-echo rate is the share of positions at which the lens's top token is the input token, "
    "beside that of the model itself. Intervals resample documents."
)
DOES_NOT_SAY = (
    "KL of models with different vocabularies or texts cannot be subtracted: compare shapes of "
    "curves, or each with its own constant.",
    "A lens that fails does not show that the layer holds no information about the prediction; a "
    "fitted lens may read it.",
    "Layers of equal relative depth need not do the same work in models of different depth.",
)


@dataclass(frozen=True)
class ModelCurveRow:
    """What a lens says at one layer of one model."""

    model: str
    lens: str
    layer: int
    depth: float
    """Relative depth l / L."""
    n: int
    kl: float | None
    """Mean KL(model || lens), nats."""
    kl_interval: Interval
    kl_of_constant: float | None
    """KL as a share of that of the constant distribution: above 1 the lens is worse than it."""
    agreement: float | None
    """Share of positions with the model's top token on top."""
    agreement_interval: Interval
    echo: float | None
    """Share of positions whose input token is on top."""
    echo_interval: Interval
    n_undefined: int
    """Positions whose logits are no distribution."""


@dataclass(frozen=True)
class ModelSummaryRow:
    """A lens on one model as a whole."""

    model: str
    lens: str
    blocks: int
    vocabulary: int
    n: int
    entropy: float | None
    """Mean entropy of the model's distribution, nats."""
    cross_entropy: float | None
    """Mean -log p of the text's next token under the model, nats."""
    constant_kl: float | None
    """KL(model || its mean distribution), nats: the yardstick."""
    failing_layers: int
    """Layers below the last at which the lens fails."""
    layers: int
    """Layers below the last that the lens reads."""
    fails_until: float | None
    """Largest relative depth at which the lens fails; None where it nowhere does."""
    largest_echo: float | None
    """Largest input-echo rate of a layer below the last."""
    echo_depth: float | None
    """Relative depth of it."""
    model_echo: float | None
    """Input-echo rate of the model itself."""


def compare_by_depth(
    caches: "Sequence[ActivationCache]",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Read each of `caches` with the logit lens and its own lenses, see `study_compare`."""
    named = name_readouts(lenses)
    owners = {name: caches_of(lens, caches) for name, lens in named.items()}
    for name, of_lens in owners.items():
        if not of_lens:
            raise MismatchError(f"{name} is a lens of none of the models of these caches")
    labels = model_labels(caches)
    rows: list[ModelCurveRow] = []
    summaries: list[ModelSummaryRow] = []
    samples, notes = [], []
    with show_stages(progress) as report:
        for cache, label in zip(caches, labels, strict=True):
            sample = choose_positions(cache, split, max_positions, seed)
            of_model: dict[str, Readout] = {"logit": LogitLens.of(cache, 0)}
            of_model |= {str(n): lens for n, lens in named.items() if cache in owners[n]}
            readings = measure_trajectories(
                sample,
                of_model,
                measures=MEASURED,
                marginals=True,
                device=device,
                progress=progress_of_stage(report, "trajectories"),
            )
            samples.append(sample)
            for lens, found in readings.items():
                curve = curve_rows(sample, label, lens, found)
                rows += curve
                summaries.append(summary_row(sample, label, found, curve))
            if missing := cache.n_blocks + 1 - len(cache.layers):
                notes.append(f"{label}: the cache lacks {missing} of its layers")
            if sample.units.note:
                notes.append(f"{label}: {sample.units.note}")
    undefined = sum(row.n_undefined for row in rows)
    if undefined:
        notes.append(f"{undefined:,} readings have logits that are no distribution")
    data = list(dict.fromkeys(cache.manifest.data_name for cache in caches))
    return StudyResult(
        study="compare",
        title=f"{len(caches)} models by relative depth",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject(
            caches=tuple(cache.id for cache in caches),
            model_name=", ".join(labels),
            data_name=", ".join(data),
            split=split,
            n=sum(sample.count for sample in samples),
            n_of="positions",
            units=samples[0].units.name,
            n_units=sum(sample.units.count for sample in samples),
            probes={str(name): repr(probe) for name, probe in named.items()},
        ),
        tables=[
            StudyTable("models", "Lenses on each model", SUMMARY_HEADINGS, summaries),
            StudyTable("curves", "By layer", CURVE_HEADINGS, rows),
        ],
        figures=[draw_curves(rows)],
        says=describe_models(summaries, rows),
        does_not_say=DOES_NOT_SAY,
        notes=[*notes, *describe_names(named)],
        settings={"max_positions": max_positions, "seed": seed, "by": "depth"},
    )


SUMMARY_HEADINGS = {
    "model": "model",
    "lens": "lens",
    "blocks": "L",
    "vocabulary": "vocabulary",
    "n": "n",
    "entropy": "entropy, nats",
    "constant_kl": "KL of constant",
    "failing_layers": "layers that fail",
    "layers": "of",
    "fails_until": "until depth",
    "largest_echo": "largest echo",
    "echo_depth": "at depth",
    "model_echo": "model's echo",
}
CURVE_HEADINGS = {
    "model": "model",
    "lens": "lens",
    "layer": "layer",
    "depth": "depth",
    "kl": "KL, nats",
    "kl_interval": "95 %",
    "kl_of_constant": "KL / constant's",
    "agreement": "same top token",
    "agreement_interval": "95 %",
    "echo": "input echo",
}


def model_labels(caches: "Sequence[ActivationCache]") -> list[str]:
    """Name of each model, with the cache's id where two models have one name."""
    labels = [model_label(cache) for cache in caches]
    return [
        f"{label} {cache.id[:SHORT_ID]}" if labels.count(label) > 1 else label
        for label, cache in zip(labels, caches, strict=True)
    ]


def curve_rows(
    sample: PositionSample, model: str, lens: str, found: Trajectories
) -> list[ModelCurveRow]:
    """A row for each layer of a lens."""
    constant = constant_kl(sample, found)
    rows = []
    for column, layer in enumerate(found.layers):
        top, kl = found.top[:, column], found.values["kl"][:, column]
        known = np.where(top >= 0, 1.0, np.nan)
        echo, echo_interval = sample.mean(known * (top == sample.tokens))
        rank = found.values["rank"][:, column]
        mean, interval = sample.mean(kl)
        agreement, agreement_interval = sample.mean(np.where(np.isnan(rank), np.nan, rank == 1))
        rows.append(
            ModelCurveRow(
                model=model,
                lens=lens,
                layer=layer,
                depth=layer / sample.cache.n_blocks,
                n=int((~np.isnan(kl)).sum()),
                kl=mean,
                kl_interval=interval,
                kl_of_constant=mean / constant if mean is not None and constant else None,
                agreement=agreement,
                agreement_interval=agreement_interval,
                echo=echo,
                echo_interval=echo_interval,
                n_undefined=int((top < 0).sum()),
            )
        )
    return rows


def constant_kl(sample: PositionSample, found: Trajectories) -> float | None:
    """Mean KL(p || mean of p) of the model's distributions p, nats: H(mean p) - mean H(p)."""
    entropy, _ = sample.mean(found.values["entropy"][:, -1])
    if found.marginal is None or entropy is None or not np.isfinite(found.marginal[-1]).all():
        return None
    p = found.marginal[-1][found.marginal[-1] > 0]
    return max(0.0, float(-(p * np.log(p)).sum()) - entropy)


def summary_row(
    sample: PositionSample, model: str, found: Trajectories, curve: Sequence[ModelCurveRow]
) -> ModelSummaryRow:
    """The row of one lens on one model."""
    constant, below = constant_kl(sample, found), curve[:-1]
    failing = [
        row
        for row in below
        if constant is not None and row.kl_interval[0] is not None and row.kl_interval[0] > constant
    ]
    echoes = [row for row in below if row.echo is not None]
    most = max(echoes, key=lambda row: row.echo or 0, default=None)
    return ModelSummaryRow(
        model=model,
        lens=curve[0].lens,
        blocks=sample.cache.n_blocks,
        vocabulary=sample.cache.vocab,
        n=sample.count,
        entropy=sample.mean(found.values["entropy"][:, -1])[0],
        cross_entropy=sample.mean(found.values["cross_entropy"][:, -1])[0],
        constant_kl=constant,
        failing_layers=len(failing),
        layers=len(below),
        fails_until=max((row.depth for row in failing), default=None),
        largest_echo=None if most is None else most.echo,
        echo_depth=None if most is None else most.depth,
        model_echo=curve[-1].echo,
    )


def draw_curves(rows: Sequence[ModelCurveRow]) -> StudyFigure:
    """KL, agreement and input echo by relative depth, a line for each model and lens."""
    several = len({row.lens for row in rows}) > 1
    curves: dict[tuple[str, str], list[ModelCurveRow]] = {}
    for row in rows:
        curves.setdefault((row.model, row.lens), []).append(row)
    lenses = list(dict.fromkeys(lens for _, lens in curves))

    def panel(measure: str, title: str, y_label: str) -> Panel:
        has_interval = hasattr(rows[0], f"{measure}_interval")
        series = []
        for (model, lens), curve in curves.items():
            ends = [getattr(row, f"{measure}_interval") for row in curve] if has_interval else None
            series.append(
                Series(
                    f"{model}, {lens}" if several else model,
                    [row.depth for row in curve],
                    [getattr(row, measure) for row in curve],
                    None if ends is None else [low for low, _ in ends],
                    None if ends is None else [high for _, high in ends],
                    dash=("solid", "dash", "dot")[min(lenses.index(lens), 2)],
                    names=[f"layer {row.layer}" for row in curve],
                )
            )
        is_share = measure in ("agreement", "echo")
        return Panel(
            title,
            "relative depth l / L",
            y_label,
            series,
            (0, 1 if is_share else None),
            reference=1.0 if measure == "kl_of_constant" else None,
            reference_label="constant distribution" if measure == "kl_of_constant" else "",
        )

    return StudyFigure(
        "curves",
        "KL of each lens to the model as a share of that of a constant distribution (above 1 the "
        "lens fails), how often its top token is the model's, and how often it is the input token.",
        [
            [
                panel("kl_of_constant", "Distance to the model", "KL / KL of a constant"),
                panel("agreement", "Same top token as the model", "share of positions"),
                panel("echo", "Top token is the input token", "share of positions"),
            ]
        ],
    )


def describe_models(
    summaries: Sequence[ModelSummaryRow], rows: Sequence[ModelCurveRow]
) -> list[str]:
    """A sentence for each model and lens."""
    says = []
    for row in summaries:
        lens = f"{row.model}, {row.lens} lens (n = {row.n:,})"
        if row.constant_kl is None:
            says.append(f"{lens}: the model's logits are no distribution.")
            continue
        fails = f"worse than a constant distribution at {row.failing_layers} of {row.layers} layers"
        if row.fails_until is None:
            fails = f"at no layer clearly worse than a constant distribution ({row.layers} layers)"
        else:
            fails += f", the last at depth {row.fails_until:.2f}"
        sentence = f"{lens}: {fails}"
        if row.largest_echo is not None and row.model_echo is not None:
            interval = next(
                found.echo_interval
                for found in rows
                if (found.model, found.lens, found.depth) == (row.model, row.lens, row.echo_depth)
            )
            sentence += (
                f"; its top token is the input token at up to {row.largest_echo:.1%} "
                f"{format_interval(interval, '.1%')} of positions (depth {row.echo_depth:.2f}; the "
                f"model itself {row.model_echo:.1%})"
            )
        says.append(f"{sentence}.")
    return says
