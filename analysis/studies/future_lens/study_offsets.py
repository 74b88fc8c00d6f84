"""Future Lens (Pal et al., 2311.04897): what a state says of the tokens after the next one.

`study_future_lens` chooses sequences and pairs (pair_filters.py), has all probes measured there
(pair_measures.py, with the measures of `residua.evaluate`), and makes rows (layer_rows.py,
confidence_rows.py, name_rows.py), figures (offset_figures.py, passage_picture.py) and sentences
(offset_texts.py) of the sums.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import MismatchError, UsageError
from ....cache.number_ranges import absolute_numbers, as_tuple, as_whole_number
from ....cache.progress import Auto, StageProgress, show_stages
from ....cache.tokens.segments import PairScope
from ....probes.base.readout import Readout
from ....probes.base.resampling import ResamplingUnits, resampling_counts
from ....probes.baselines.marginal_bigram import MarginalBigram
from ....probes.lens.logit_lens import LogitLens
from ....probes.saved.save import check_belongs
from ...evaluation.confidence_buckets import ResultKey
from ...evaluation.plan import FITTED_SPLITS, EvaluationPlan, plan_evaluation
from ...evaluation.probe_names import ProbeName, probe_list
from ...evaluation.windows import check_where, choose_sequences
from ...token_texts.position_masks import check_has_words
from ..results.study_figures import StudyFigure
from ..results.study_result import StudyResult, StudySubject, StudyTable
from .confidence_rows import bucket_rows, calibration_rows, curve_points
from .layer_rows import (
    OffsetRow,
    difference_rows,
    is_baseline,
    is_control,
    offset_rows,
    peak_key,
    peak_rows,
)
from .name_rows import NameRow, name_rows
from .offset_figures import (
    bucket_figure,
    calibration_figure,
    kept_figure,
    layer_figures,
    names_figure,
)
from .offset_texts import (
    BUCKET_HEADINGS,
    CALIBRATION_HEADINGS,
    CURVE_HEADINGS,
    DIFFERENCE_HEADINGS,
    DOES_NOT_SAY,
    KEPT_HEADINGS,
    METHOD,
    NAME_HEADINGS,
    OFFSET_HEADINGS,
    PEAK_HEADINGS,
    QUESTION,
    describe_names,
    describe_results,
    probe_descriptions,
)
from .pair_filters import KEEPS, Masks, filter_masks, find_correct_positions, kept_rows
from .pair_measures import MOST_RECORDED, PairMeasures, measure_pairs
from .passage_picture import WIDTH, PicturePassage, find_telling_future, picture_panel
from .repeated_names import REPEATS, find_repeated_names, masks_inside_names

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache

MOST_PICTURES = 3
"""Most probes whose passage is drawn."""


def study_future_lens(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    offsets: int | Iterable[int] | None = None,
    layers: int | Iterable[int] | None = None,
    keep: str = "none",
    first_only: bool = False,
    where: np.ndarray | None = None,
    names: "str | np.ndarray | None" = "document",
    sequence: int | None = None,
    start: int = 0,
    width: int = WIDTH,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Measure what probes say of the model's predictions N tokens after the next one.

    The logit lens, the bigram and the marginalised bigram are measured beside `lenses`: ridge,
    lenses, vocabulary probes, their controls, or other baselines.

    - `offsets`, `layers`: default those of the probes, else 0 to 3 and all layers.
    - `keep`: `none` takes all pairs (t, t+N); `correct` those for which the model's top token after
      t+N is the text's; `agree` those for which this holds at all of t, ..., t+N, so that the
      model's greedy continuation is the text. The shares are in the table `kept`.
    - `first_only`: only pairs whose t is the first kept position of its sequence, as in a cache
      that keeps the positions of a continuation.
    - `where`: bool mask `(positions,)`; only targets t+N in it count.
    - `names`: where a name of several tokens must occur again to be in the table `names`:
      `document`, `data` or `any`; or a bool mask `(positions,)` of the positions whose next token
      continues an entity; None leaves names out.
    - `sequence`, `start`, `width`: passage of the picture, by default a telling one.

    Raises `UsageError` for a split, filter or mask without a pair, and `NotFoundError` and
    `MismatchError` as `residua.evaluate` does.
    """
    # 1. Sequences, pairs and probes.
    max_positions, seed = (
        as_whole_number(max_positions, "max_positions"),
        as_whole_number(seed, "seed"),
    )
    width = as_whole_number(width, "width")
    if keep not in KEEPS:
        raise UsageError(f"keep must be one of {', '.join(KEEPS)}, not {keep!r}")
    for lens in probe_list(lenses):
        check_belongs(lens, cache)
    check_where(cache, where)
    if layers is not None:
        layers = absolute_numbers(as_tuple(layers, "layers"), cache.n_blocks)
    torch_device = choose_device(device)
    sequences = choose_sequences(cache, split, max_positions, seed)
    scope = PairScope()
    units = ResamplingUnits.of(cache, sequences, seed)
    weights = resampling_counts(units.n_resampled, seed)
    plan, notes = plan_floors(cache, lenses, offsets=offsets, layers=layers, split=split)
    correct = find_correct_positions(cache, sequences, scope, torch_device)
    filters = {"correct": correct, "first_only": first_only, "where": where}
    masks = filter_masks(cache, sequences, scope, plan.offsets, keep=keep, **filters)
    kept = kept_rows(cache, sequences, scope, plan.offsets, units=units, weights=weights, **filters)

    # 2. One pass over the pairs, and one over those inside names.
    with show_stages(progress) as report:

        def measure(stage: str, of_pairs: Masks, records: bool = False) -> PairMeasures:
            def show(done: int, total: int) -> None:
                assert report is not None
                report(stage, done, total)

            return measure_pairs(
                cache,
                plan,
                sequences,
                scope,
                of_pairs,
                units=units,
                weights=weights,
                device=torch_device,
                records=records,
                progress=None if report is None else show,
            )

        measures = measure("evaluate", masks, records=True)
        if not any(measures.count(key) for key in measures.sums):
            raise UsageError(_no_pair_message(split, keep, first_only, where is not None))
        name_mask, name_notes = _name_mask(cache, sequences, names)
        notes += name_notes
        inside = None
        if name_mask is not None:
            in_names = masks_inside_names(name_mask, plan.offsets)
            inside = measure("names", {n: _both(masks[n], m) for n, m in in_names.items()})

    # 3. Rows, figures, sentences.
    rows = offset_rows(measures)
    offsets_found = tuple(sorted({row.offset for row in rows}))
    peaks = peak_rows(measures, plan.readouts, offsets_found)
    main = [
        name
        for name, readout in plan.readouts.items()
        if not is_baseline(readout) and not is_control(readout)
    ]
    given = [name for name in main if type(plan.readouts[name]) is not LogitLens] or main
    best_keys = [
        key
        for name in given
        for offset in offsets_found
        if (key := peak_key(measures, name, offset)) is not None
    ]
    differences = difference_rows(measures, plan.readouts, offsets_found)
    buckets = bucket_rows(measures, best_keys)
    calibration = calibration_rows(measures, best_keys, units)
    curve = curve_points(measures, best_keys, units)
    of_names: list[NameRow] = [] if inside is None else name_rows(inside, measures, best_keys)
    figures = layer_figures(rows, plan.readouts, offsets_found, keep)
    picture = _picture(
        cache,
        measures,
        plan,
        given,
        best_keys,
        sequences=sequences,
        passage=None if sequence is None else PicturePassage(sequence, start, width),
        width=width,
        device=torch_device,
    )
    figures[1:1] = [picture] if picture is not None else []
    figures += [bucket_figure(buckets, offsets_found), calibration_figure(curve, offsets_found)]
    figures.append(kept_figure(kept))
    if of_names:
        figures.append(names_figure(of_names))
    missing = sorted(set(plan.offsets) - set(offsets_found))
    if missing:
        notes.append(f"no pair is kept at the offsets {missing}; they have no row")
    return StudyResult(
        study="future-lens",
        title=f"Future lens of {cache.manifest.model_name}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=max((row.n for row in rows), default=0),
            n_of="pairs (t, t+N) at the offset with most",
            units=units.name,
            n_units=units.count,
            probes=probe_descriptions({name: plan.readouts[name] for name in plan.readouts}),
        ),
        tables=[
            StudyTable("peaks", "Where each offset is read best", PEAK_HEADINGS, peaks),
            StudyTable("measures", "All layers and offsets", OFFSET_HEADINGS, rows),
            StudyTable(
                "differences",
                "Each probe at its best layer, less baselines, controls and other probes",
                DIFFERENCE_HEADINGS,
                differences,
            ),
            StudyTable("kept", "Pairs that each filter keeps", KEPT_HEADINGS, kept),
            StudyTable(
                "confidence", "Precision by the model's confidence", BUCKET_HEADINGS, buckets
            ),
            StudyTable(
                "calibration",
                "The probes' own confidence",
                CALIBRATION_HEADINGS,
                calibration,
            ),
            StudyTable(
                "calibration-curve",
                "Hits by the probes' own confidence",
                CURVE_HEADINGS,
                curve,
                most_shown=0,
            ),
            StudyTable("names", "Inside names of several tokens", NAME_HEADINGS, of_names),
        ],
        figures=figures,
        says=describe_results(
            [row for row in peaks if row.probe in given],
            differences,
            buckets=buckets,
            calibration=calibration,
            kept=kept,
            names=of_names,
            keep=keep,
        ),
        does_not_say=DOES_NOT_SAY,
        notes=[*notes, *_notes(rows, units, measures)],
        settings={
            "split": split,
            "max_positions": max_positions,
            "offsets": list(plan.offsets),
            "layers": list(plan.layers),
            "keep": keep,
            "first_only": first_only,
            "where": where is not None,
            "names": names if names is None or isinstance(names, str) else "mask",
            "seed": seed,
            "device": str(torch_device),
            "products": measures.products,
        },
    )


def plan_floors(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout],
    *,
    offsets: int | Iterable[int] | None,
    layers: int | Iterable[int] | None,
    split: str,
) -> tuple[EvaluationPlan, list[str]]:
    """The plan of `residua.evaluate`, with a marginalised bigram beside the bigram; and notes."""
    plan = plan_evaluation(
        cache, lenses, offsets=offsets, layers=layers, split=split, progress=None
    )
    notes = [*plan.notes, *plan.baseline_notes]
    later = tuple(offset for offset in plan.offsets if offset > 0)
    kinds = {readout.kind for readout in plan.readouts.values()}
    if MarginalBigram.kind in kinds or not later or not len(cache.sequences("train")):
        return plan, notes
    if split in FITTED_SPLITS:
        notes.append(
            f"the {split} split holds the text that a marginalised bigram counts, so that there is "
            "none beside the probes; take split='test'"
        )
        return plan, notes
    try:
        marginal = MarginalBigram(later).fit(cache, progress=None)
    except (UsageError, MismatchError) as error:
        return plan, [*notes, f"there is no marginalised bigram beside the probes: {error}"]
    name = ProbeName(MarginalBigram.kind, MarginalBigram.kind)
    return (
        FloorPlan(
            readouts={name: marginal, **plan.readouts},
            layers=plan.layers,
            offsets=plan.offsets,
            floor=name,
            depth=cache.n_blocks,
        ),
        notes,
    )


@dataclass(frozen=True)
class FloorPlan(EvaluationPlan):
    """A plan with a baseline that reads layer L, whether or not the probes are read there."""

    floor: str = ""
    """Name of the baseline."""
    depth: int = 0
    """L, the number of blocks."""

    @cached_property
    def keys(self) -> list[ResultKey]:
        """All results, sorted by offset, then probe, then layer."""
        everywhere = EvaluationPlan(
            self.readouts, tuple(sorted({*self.layers, self.depth})), self.offsets
        )
        return [
            key
            for key in everywhere.keys
            if key.layer is None or key.layer in self.layers or key.probe == self.floor
        ]


def _name_mask(
    cache: "ActivationCache", sequences: np.ndarray, names: "str | np.ndarray | None"
) -> tuple[np.ndarray | None, list[str]]:
    """The mask of positions whose next token continues a name, and notes; None without names."""
    if names is None:
        return None, []
    if isinstance(names, np.ndarray):
        check_where(cache, names)
        return names, []
    if names not in REPEATS:
        raise UsageError(
            f"names must be one of {', '.join(REPEATS)}, a bool mask over positions or None, not "
            f"{names!r}"
        )
    try:
        check_has_words(cache)
    except UsageError as error:
        return None, [f"there is no table of names: {error}"]
    found = find_repeated_names(cache, sequences, names)
    return (found.mask if found.occurrences else None), [describe_names(found, names)]


def _both(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    return other if one is None else one & other


def _picture(
    cache: "ActivationCache",
    measures: PairMeasures,
    plan: EvaluationPlan,
    given: Sequence[str],
    best_keys: Sequence[ResultKey],
    *,
    sequences: np.ndarray,
    passage: PicturePassage | None,
    width: int,
    device: "torch.device",
) -> StudyFigure | None:
    """The Future Lens picture of the probes `given`, in one passage; None where none tells much."""
    if passage is None:
        bigram = next((n for n, readout in plan.readouts.items() if readout.kind == "bigram"), None)
        for name in given:
            peaks = {key.offset: key for key in best_keys if key.probe == name}
            passage = find_telling_future(cache, measures, sequences, peaks, bigram, width)
            if passage is not None:
                break
    if passage is None:
        return None
    panels = [
        picture_panel(cache, name, plan.readouts[name], plan.offsets, passage, device)
        for name in given[:MOST_PICTURES]
    ]
    return StudyFigure(
        name="future-tokens",
        caption="What each layer says after each token: the likeliest tokens t+1, t+2, ... one "
        "after the other; the colour is the mean of their probabilities. Unless it was named, the "
        "passage is the one with most later words that the bigram does not give: it shows the "
        "probes at their best.",
        rows=[[panel] for panel in panels],
    )


def _no_pair_message(split: str, keep: str, first_only: bool, has_mask: bool) -> str:
    parts = [
        *([f"the filter {keep!r}"] if keep != "none" else []),
        *(["the first positions of sequences"] if first_only else []),
        *(["the mask `where`"] if has_mask else []),
    ]
    by = f" by {' and '.join(parts)}" if parts else ""
    return (
        f"no pair (t, t+N) of the {split} split is kept{by}; raise max_positions, or take smaller "
        "offsets or another filter"
    )


def _notes(rows: Sequence[OffsetRow], units: ResamplingUnits, measures: PairMeasures) -> list[str]:
    """What a reader must know about single figures."""
    notes = []
    if undefined := [row for row in rows if row.n_undefined]:
        worst = max(undefined, key=lambda row: row.n_undefined)
        notes.append(
            f"{len(undefined)} rows have pairs without a distribution (NaN, +inf), most "
            f"{worst.probe} at layer {worst.layer}, N = {worst.offset} ({worst.n_undefined:,} of "
            f"{worst.n:,}): their measures are undefined"
        )
    if units.note:
        notes.append(units.note)
    notes.append(
        "the precision at the best layer is the largest of several noisy numbers, and slightly too "
        "high; an expected calibration error has no sign, and noise alone raises it, in resamples "
        "more than in the data"
    )
    records = measures.records
    if records is not None and records.n == MOST_RECORDED:
        notes.append(f"calibration and the passage are of the first {records.n:,} positions")
    return notes
