"""Study `depth`: how many layers a prediction takes, for which tokens, and whether hard ones more.

Prediction depth is that of the tuned-lens paper (2303.08112, section 4.4) and of Baldock et al.
(2106.09647): depths.py has the definition, learned_iterations.py that of the iteration learned.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import UsageError
from ....cache.format.manifest import SHORT_ID
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.probe_names import name_readouts
from ..results.study_result import StudyResult, StudySubject, StudyTable
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories
from .depth_figures import depth_figures
from .depth_rows import (
    CLASS,
    FREQUENCY,
    LEARNED,
    DepthCorrelationRow,
    DepthShareRow,
    PredictionDepthRow,
    correlation_rows,
    depth_rows,
    share_rows,
)
from .depth_sentences import DOES_NOT_SAY, METHOD, QUESTION, depth_sentences
from .depths import prediction_depths
from .learned_iterations import CheckpointReadings, read_checkpoints
from .token_classes import classify_next_tokens, count_tokens, frequency_deciles

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

NEEDED = ("cross_entropy",)
"""Measures of trajectories that the study needs beside the top tokens."""


def study_prediction_depth(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    checkpoints: "Mapping[int, ActivationCache] | None" = None,
    learned: str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
    sample: PositionSample | None = None,
    readings: Mapping[str, Trajectories] | None = None,
) -> StudyResult:
    """Prediction depth of the positions of a split under the logit lens and every given lens.

    `checkpoints` are caches of the same texts by other checkpoints of the model, by iteration: they
    give the iteration learned. `learned` names a label of sequences with such a number. `sample`
    and `readings` (which need `cross_entropy`) are those of a caller that has them. Raises
    `MismatchError` for checkpoints with other tokens, `NotFoundError` for a label or layer that is
    not there.
    """
    if sample is None:
        sample = choose_positions(cache, split, max_positions, seed)
    of_label = None if learned is None else _label_numbers(sample, learned)
    found: CheckpointReadings | None = None
    with show_stages(progress) as report:
        if readings is None:
            readings = measure_trajectories(
                sample,
                name_readouts(lenses, [LogitLens.of(cache, 0)]),
                measures=NEEDED,
                device=device,
                progress=progress_of_stage(report, "trajectories"),
            )
        if checkpoints is not None:
            stage = progress_of_stage(report, "checkpoints")
            found = read_checkpoints(sample, checkpoints, choose_device(device), stage)
    notes: list[str] = []

    # What is known of each position: loss, class and frequency of the next token, when learned.
    any_lens = next(iter(readings.values()))
    loss = any_lens.values["cross_entropy"][:, -1].astype(np.float64)
    correct = np.where(np.isnan(loss), np.nan, any_lens.top[:, -1] == sample.text_tokens)
    groups, variables = _next_token_groups(sample, loss, correct, notes)
    if found is not None:
        when = found.learned_or_later()
        groups[LEARNED] = when
        variables["iteration learned", "learned"] = np.where(np.isinf(when), np.nan, when)
        variables["iteration learned", "all, never last"] = when
        never = np.isinf(when).sum() / max(1, found.known.sum())
        notes.append(
            f"iteration learned: of {int(found.known.sum())} positions that all checkpoints "
            f"({', '.join(map(str, found.iterations))}) predict, {100 * never:.0f} % are not "
            "learned by the last one"
        )
        if found.sequences < len(sample.sequences):
            notes.append(
                f"{len(sample.sequences) - found.sequences} of {len(sample.sequences)} sequences "
                "are not in the cache of every checkpoint and do not count there"
            )
    if of_label is not None and learned is not None:
        variables[learned, "all"] = of_label

    # Depths of each lens, by group and layer, and their correlations.
    rows: list[PredictionDepthRow] = []
    shares: list[DepthShareRow] = []
    correlations: list[DepthCorrelationRow] = []
    for name, lens in readings.items():
        depth = prediction_depths(lens.top, lens.layers)
        rows += depth_rows(sample, str(name), (depth, loss, correct), groups)
        shares += share_rows(sample, str(name), lens.layers, lens.top, depth)
        correlations += correlation_rows(sample, str(name), depth, variables, loss)
        if lens.undefined:
            notes.append(
                f"{name}: {lens.undefined} readings have logits that are not finite; they agree "
                "with no prediction, and positions where the model's are have no depth"
            )
        if len(lens.layers) < cache.n_blocks + 1:
            notes.append(
                f"{name} reads the layers {', '.join(map(str, lens.layers))}: depths are among "
                "these alone"
            )
    if sample.units.note:
        notes.append(sample.units.note)

    return StudyResult(
        study="depth",
        title=f"Prediction depth of {cache.manifest.model_name}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            sample.split,
            n=sample.count,
            n_of="positions",
            units=sample.units.name,
            n_units=sample.units.count,
            probes=_describe_lenses(lenses, readings),
        ),
        tables=_tables(rows, shares, correlations),
        figures=depth_figures(rows, shares, cache.n_blocks),
        says=depth_sentences(rows, correlations, cache.n_blocks),
        does_not_say=DOES_NOT_SAY,
        notes=notes,
        settings=_settings(sample, checkpoints, learned),
    )


def _next_token_groups(
    sample: PositionSample, loss: np.ndarray, correct: np.ndarray, notes: list[str]
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Groups of positions by their next token, and the numbers that depths correlate with."""
    cache, text = sample.cache, sample.text_tokens
    groups: dict[str, np.ndarray] = {}
    try:
        groups[CLASS] = classify_next_tokens(cache, sample.positions, text)
    except UsageError as error:
        notes.append(f"no classes of tokens: {str(error).partition(';')[0]}")
    counts = count_tokens(cache)
    groups[FREQUENCY] = frequency_deciles(counts, text)
    # Where a text ends there is no next token, and token 0 may stand nowhere.
    log_count = np.log(np.maximum(counts[np.maximum(text, 0)], 1).astype(np.float64))
    variables = {
        ("loss", "all"): loss,
        ("loss", "right"): np.where(correct == 1, loss, np.nan),
        ("frequency", "all"): np.where(text >= 0, log_count, np.nan),
    }
    return groups, variables


def _label_numbers(sample: PositionSample, name: str) -> np.ndarray:
    """Numbers of the label `name` of the sequence of each position, `(n,)` float64.

    Raises `NotFoundError` for no such label, `UsageError` for a label of words.
    """
    values = np.asarray(sample.cache.label(name))[sample.sequence_numbers]
    if values.dtype.kind not in "biuf":
        raise UsageError(
            f"the label {name!r} has words, such as {str(values[0])[:40]!r}; the iteration at "
            "which a text was learned is a number"
        )
    return values.astype(np.float64)


def _describe_lenses(
    lenses: Sequence[Readout] | Mapping[str, Readout], readings: Mapping[str, Trajectories]
) -> dict[str, str]:
    """Name -> what it is, for the lenses that were given."""
    values = list(lenses.values()) if isinstance(lenses, Mapping) else list(lenses)
    names = [name for name in readings if name != LogitLens.kind]
    return {
        str(name): " ".join(repr(lens).split()) for name, lens in zip(names, values, strict=False)
    }


def _tables(
    rows: Sequence[PredictionDepthRow],
    shares: Sequence[DepthShareRow],
    correlations: Sequence[DepthCorrelationRow],
) -> list[StudyTable]:
    """The three tables of the study."""
    return [
        StudyTable(
            "depth",
            "Prediction depth by class, frequency and iteration learned of the next token",
            {
                "lens": "lens",
                "division": "positions by",
                "group": "group",
                "n": "n",
                "depth": "mean depth (layers)",
                "depth_median": "median",
                "loss": "loss (nats)",
                "accuracy": "model is right",
            },
            rows,
        ),
        StudyTable(
            "settled",
            "Where predictions settle, layer by layer",
            {
                "lens": "lens",
                "layer": "layer",
                "n": "n",
                "share": "share with this depth",
                "settled": "settled by here",
                "agreement": "top token is the model's",
            },
            shares,
        ),
        StudyTable(
            "correlations",
            "Spearman correlation of the depth with other numbers of a position",
            {
                "lens": "lens",
                "variable": "with",
                "given": "given",
                "positions": "positions",
                "n": "n",
                "correlation": "rho",
            },
            correlations,
        ),
    ]


def _settings(
    sample: PositionSample,
    checkpoints: "Mapping[int, ActivationCache] | None",
    learned: str | None,
) -> dict[str, Any]:
    """Arguments that change the numbers."""
    settings: dict[str, Any] = {"split": sample.split, "seed": sample.seed}
    if checkpoints is not None:
        settings["checkpoints"] = ", ".join(
            f"{number}: {other.id[:SHORT_ID]}" for number, other in sorted(checkpoints.items())
        )
    if learned is not None:
        settings["learned"] = learned
    return settings
