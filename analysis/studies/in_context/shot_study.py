"""In-context learning: how far ahead states foresee what only the context determines, by shots.

Texts of `residua data icl` end with an answer that follows from k examples in the context. For the
state at t of each position before an answer token, the study gives precision@1 of the token after
t+N, by layer, N and k, beside the bigram marginalised over the tokens between, which knows the next
token but not the context.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import NotFoundError, UsageError
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.baselines.marginal_bigram import BigramChain, MarginalBigram
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.probe_names import describe_names, name_readouts
from ...evaluation.windows import choose_sequences
from ..results.study_result import StudyResult, StudySubject, StudyTable
from .shot_figures import draw_figures
from .shot_readings import ShotSample, measure_hits
from .shot_rows import BEYOND, INSIDE, FirstShotRow, ShotLabels, ShotRow, first_shot_rows, shot_rows

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

HEADINGS = {
    "kind": "kind",
    "lens": "lens",
    "layer": "layer",
    "offset": "N",
    "part": "part of the answer",
    "shots": "shots",
    "predictable": "predictable",
    "n": "pairs",
    "precision": "precision@1",
    "precision_interval": "95 %",
    "bigram": "bigram",
    "gain": "gain",
    "gain_interval": "95 % of the gain",
}
FIRST_HEADINGS = {
    "kind": "kind",
    "lens": "lens",
    "layer": "layer",
    "offset": "N",
    "first_shots": "above the bigram from shots",
    "most_shots": "most shots",
    "gain": "gain there",
    "gain_interval": "95 %",
    "n": "pairs there",
}


def study_in_context(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    kind: str = "kind",
    shots: str = "shots",
    offsets: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Measure how far ahead `lenses` foresee answers that follow from shots in the context.

    The logit lens at N = 0 is always among the lenses. `kind` and `shots` name labels; a cache
    without the label `kind` has one kind. `offsets` limits N, by default to those of the lenses up
    to the longest answer. Bigrams are counted in the train split of the cache, unless a
    `BigramChain` (N = 0) and a `MarginalBigram` (N >= 1) are among the lenses. Raises `UsageError`
    and `NotFoundError` for caches and lenses that do not fit.
    """
    labels = cache.label_names
    if shots not in labels:
        raise NotFoundError(
            f"there is no label {shots!r} in this cache (labels: {', '.join(labels) or 'none'}); "
            "make texts with `residua data icl` and extract them with --no-pack"
        )
    named = dict(name_readouts(lenses, [LogitLens.of(cache, 0)]))
    counted = {name: lens for name, lens in named.items() if isinstance(lens, MarginalBigram)}
    named = {name: lens for name, lens in named.items() if name not in counted}
    sample = ShotSample(cache, choose_sequences(cache, split, max_positions, seed), seed)
    used = _choose_offsets(sample, named, offsets)
    bigrams = _bigrams(sample, list(counted.values()), used)
    with show_stages(progress) as report:
        found = measure_hits(
            sample,
            {**named, **bigrams},
            used,
            choose_device(device),
            progress_of_stage(report, "shots"),
        )
    of_bigram = {offset: hits for (name, _, offset), hits in found.items() if name in bigrams}
    hits = {key: value for key, value in found.items() if key[0] not in bigrams}
    rows = shot_rows(sample, _labels_of(sample, kind, shots), hits, of_bigram)
    if not rows:
        raise UsageError(
            "the lenses read no offset at which an answer has a token; fit probes at --offsets 0-3"
        )
    firsts = first_shot_rows(rows)
    return StudyResult(
        study="icl",
        title=f"In-context learning of {cache.manifest.model_name}",
        question="How far ahead do states foresee tokens that follow from examples in the context "
        "alone, and after how many examples?",
        method="At every position t before an answer token, a lens predicts the token after t+N; "
        "precision@1 is the share with the text's token on top. The bigram begins with the model's "
        "next-token distribution at t and sums out the tokens between (Mehra et al., 2502.09419): "
        "it knows what comes next, and nothing of the context beyond. A token is predictable where "
        "the text was made so that enough shots determine it.",
        subject=StudySubject.of(
            cache,
            split,
            n=len(sample.positions),
            n_of="positions",
            units=sample.units.name,
            n_units=sample.units.count,
            probes={name: " ".join(repr(lens).split()) for name, lens in named.items()},
        ),
        tables=[
            StudyTable("shots", "Precision@1 by number of shots", HEADINGS, rows),
            StudyTable(
                "first-shots",
                "Shots from which on a lens is above the bigram",
                FIRST_HEADINGS,
                firsts,
            ),
        ],
        figures=draw_figures(rows),
        says=_says(rows, firsts),
        does_not_say=[
            "A token that is on top at t was not necessarily planned there: the state may hold "
            "what correlates with it.",
            "Probes that are fitted on texts of these generators learn their format, too; the gain "
            "over the bigram at 0 shots shows how much.",
            "The layer that is named as best was chosen on the same texts.",
        ],
        notes=_notes(sample, named, counted),
        settings={"seed": seed, "max_positions": max_positions, "offsets": list(used)},
    )


def _choose_offsets(
    sample: ShotSample, named: Mapping[str, Readout], offsets: Sequence[int] | None
) -> list[int]:
    """Offsets that a lens reads and at which the sample has pairs, ascending.

    Raises `NotFoundError` for a wanted one that no lens reads.
    """
    known = {offset for lens in named.values() for _, offset in lens.pairs()}
    if offsets is not None and (missing := sorted(set(offsets) - known)):
        raise NotFoundError(
            f"no lens reads the offset {missing[0]} (offsets: {', '.join(map(str, sorted(known)))})"
        )
    chosen = known if offsets is None else set(offsets)
    used = [offset for offset in sorted(chosen) if len(sample.sources(offset))]
    if not used:
        raise UsageError(
            "no answer of this cache is longer than the offsets of the lenses; extract whole "
            "answers with `--no-pack --positions answer`, or fit probes at smaller offsets"
        )
    return used


def _bigrams(
    sample: ShotSample, counted: Sequence[MarginalBigram], offsets: Sequence[int]
) -> dict[str, Readout]:
    """The baselines: at N = 0 the bigram of x[t], at N >= 1 the marginalised one.

    `counted` are those that were given; others are counted in the train split. Their names begin
    with a NUL, which no name of a lens has. Raises `UsageError` where texts would be predicted from
    counts of themselves.
    """
    cache = sample.cache
    found: dict[str, Readout] = {}
    for kind, of_kind in ((BigramChain, [0]), (MarginalBigram, [n for n in offsets if n > 0])):
        used = [offset for offset in of_kind if offset in offsets]
        given = [lens for lens in counted if type(lens) is kind]
        if not used:
            continue
        if not given:
            _check_train_split(sample)
            found[f"\0{kind.kind}"] = kind(used).fit(cache, progress=None)
            continue
        lacking = set(used) - {offset for _, offset in given[0].pairs()}
        if lacking:
            raise NotFoundError(
                f"the baseline {kind.kind} that was given lacks the offset {min(lacking)}; fit it "
                "at all offsets of the probes, or limit --offsets"
            )
        found[f"\0{kind.kind}"] = given[0]
    return found


def _check_train_split(sample: ShotSample) -> None:
    """Raise `UsageError` unless bigrams of the train split know nothing of the sample's texts."""
    train = sample.cache.sequences("train")
    other = (
        "or count bigrams in a cache of other such texts, `residua fit baseline OTHER chain "
        "marginal`, and name them after the cache"
    )
    if not len(train):
        raise UsageError(
            "bigrams are counted in the train split, and this cache has none: extract more texts, "
            f"{other}"
        )
    if np.isin(sample.sequences, train).any():
        raise UsageError(
            "these texts hold some of the train split, in which bigrams would be counted that "
            f"predict them: read --split test, {other}"
        )


def _labels_of(sample: ShotSample, kind: str, shots: str) -> ShotLabels:
    """The labels of the sample's sequences; raises `UsageError` for shots that are no numbers."""
    cache, sequences = sample.cache, sample.sequences
    numbers = np.asarray(cache.label(shots))[sequences]
    if numbers.dtype.kind not in "iu":
        raise UsageError(f"the label {shots!r} has no whole numbers, such as {numbers[:1]!s}")
    names = np.full(len(sequences), "all")
    if kind in cache.label_names:
        names = np.asarray(cache.label(kind))[sequences].astype(str)
    needed = np.ones(len(sequences), np.int64)
    if "needed" in cache.label_names:
        needed = np.asarray(cache.label("needed"))[sequences]
    return ShotLabels(names, numbers, needed)


def best_row(firsts: Sequence[FirstShotRow], kind: str, lens: str, offset: int) -> FirstShotRow:
    """The layer with the largest gain at the largest number of shots, the last of equal ones."""
    rows = [row for row in firsts if (row.kind, row.lens, row.offset) == (kind, lens, offset)]
    return max(rows, key=lambda row: (row.gain, row.layer or 0))


def _says(rows: Sequence[ShotRow], firsts: Sequence[FirstShotRow]) -> list[str]:
    """A sentence for each kind and lens, and one on what cannot be foreseen."""
    sentences = []
    for kind, lens in dict.fromkeys((row.kind, row.lens) for row in firsts):
        offsets = sorted({row.offset for row in firsts if (row.kind, row.lens) == (kind, lens)})
        parts = [_describe_best(rows, best_row(firsts, kind, lens, offset)) for offset in offsets]
        sentences.append(f"{kind}, {lens}: {'; '.join(parts)}.")
    beyond = [row for row in rows if row.part == BEYOND and row.layer is not None]
    above = [row for row in beyond if row.gain_interval[0] is not None and row.gain_interval[0] > 0]
    if beyond:
        sentences.append(
            f"Beyond the determined part, {len(above)} of {len(beyond)} readings are above the "
            "bigram with their interval (some 2.5 % would be by chance): readings there show what "
            "words of several tokens and the format give without any shot."
        )
    return sentences


def _describe_best(rows: Sequence[ShotRow], best: FirstShotRow) -> str:
    """What one lens gives at its best layer for one kind and offset."""
    last = next(
        row
        for row in rows
        if (row.kind, row.lens, row.layer, row.offset, row.part, row.shots)
        == (best.kind, best.lens, best.layer, best.offset, INSIDE, best.most_shots)
    )
    if not last.precision:
        return (
            f"N = {best.offset} never right at {best.most_shots} shots, at any layer (bigram "
            f"{last.bigram:.2f} {_interval(last.bigram_interval)}, n = {last.n})"
        )
    low, high = last.gain_interval
    if best.first_shots is not None:
        found = f"above the bigram from {best.first_shots} shots on"
    elif high is not None and high < 0:
        found = "below the bigram"
    elif low is not None and low > 0:
        found = "above the bigram"
    else:
        found = "no clear difference to the bigram"
    return (
        f"N = {best.offset} {found} (layer {best.layer}, {best.most_shots} shots: precision@1 "
        f"{last.precision:.2f}, bigram {last.bigram:.2f}, gain {last.gain:+.2f} "
        f"{_interval(last.gain_interval)}, n = {last.n})"
    )


def _interval(interval: tuple[float | None, float | None]) -> str:
    """`[low, high]`, or that there is none."""
    low, high = interval
    return "[no interval]" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def _notes(
    sample: ShotSample, named: Mapping[str, Readout], counted: Mapping[str, Readout]
) -> list[str]:
    """What a reader must know about single figures."""
    cache, units = sample.cache, sample.units
    notes = [
        "At N = 0 the bigram is that of the token at t; from N = 1 on it begins with the model's "
        "own distribution at t.",
        f"Bigrams that were given are the baseline: {', '.join(counted)}."
        if counted
        else "Bigrams are counted in the train split of this cache.",
        "The largest offset of a text is its answer's length less one: large N have fewer pairs.",
        "Where words have several tokens, the later ones follow in part from the first, with no "
        "shot at all, and the bigram knows that too; texts of random token ids (`residua data icl "
        "--model`) have no such words.",
        *describe_names({**named, **counted}),
    ]
    if np.isin(sample.sequences, cache.sequences("train")).any():
        notes += [
            f"{name} was fitted on this cache, whose train split is among the texts that are read."
            for name, lens in named.items()
            if getattr(lens, "cache_id_", None) == cache.id
        ]
    if units.note:
        notes.append(units.note)
    inside = 100 * sample.is_inside(0, sample.sources(0)).mean()
    notes.append(f"{inside:.0f} % of the answers' tokens are in the part that shots determine.")
    return notes
