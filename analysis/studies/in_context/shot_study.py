"""In-context learning: how far ahead states foresee what only the context determines, by shots.

Texts of `residua data icl` end with an answer that follows from k examples in the context. For the
state at t of each position before an answer token, the study gives precision@1 of the token after
t+N, by layer, N and k, beside the bigram marginalised over the tokens between, which knows the next
token but not the context.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import NotFoundError, UsageError
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import FEW_DOCUMENTS
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
    to the longest answer. The bigram is counted in the train split of the cache, or is a marginal
    bigram among the lenses. Raises `UsageError` and `NotFoundError` for caches and lenses that do
    not fit.
    """
    labels = cache.label_names
    if shots not in labels:
        raise NotFoundError(
            f"there is no label {shots!r} in this cache (labels: {', '.join(labels) or 'none'}); "
            "make texts with `residua data icl` and extract them with --no-pack"
        )
    named = dict(name_readouts(lenses, [LogitLens.of(cache, 0)]))
    given = [name for name, lens in named.items() if type(lens) is MarginalBigram]
    counted = named.pop(given[0]) if given else None
    sample = ShotSample(cache, choose_sequences(cache, split, max_positions, seed), seed)
    used = _choose_offsets(sample, named, offsets)
    bigrams = _bigrams(cache, counted, used)
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
        notes=_notes(sample, named, counted is not None),
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
    cache: "ActivationCache", counted: Readout | None, offsets: Sequence[int]
) -> dict[str, Readout]:
    """The baselines: at N = 0 the bigram of x[t], at N >= 1 the marginalised one.

    Their names begin with a NUL, which no name of a lens has.
    """
    ahead = [offset for offset in offsets if offset > 0]
    if not len(cache.sequences("train")) and (counted is None or 0 in offsets):
        raise UsageError(
            "the bigram is counted in the train split, and this cache has none; extract more texts"
        )
    found: dict[str, Readout] = {}
    if 0 in offsets:
        found["\0bigram at 0"] = BigramChain([0]).fit(cache, progress=None)
    if ahead and counted is None:
        found["\0bigram"] = MarginalBigram(ahead).fit(cache, progress=None)
    elif ahead and counted is not None:
        lacking = set(ahead) - {offset for _, offset in counted.pairs()}
        if lacking:
            raise NotFoundError(
                f"the marginal bigram that was given lacks the offset {min(lacking)}; leave it out "
                "or fit one at all offsets of the probes"
            )
        found["\0bigram"] = counted
    return found


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
    """The layer with the largest gain at the largest number of shots, the lowest of equal ones."""
    rows = [row for row in firsts if (row.kind, row.lens, row.offset) == (kind, lens, offset)]
    return max(rows, key=lambda row: row.gain)


def _says(rows: Sequence[ShotRow], firsts: Sequence[FirstShotRow]) -> list[str]:
    """A sentence for each kind, lens and offset, and one on what cannot be foreseen."""
    sentences = []
    for kind, lens, offset in dict.fromkeys((row.kind, row.lens, row.offset) for row in firsts):
        best = best_row(firsts, kind, lens, offset)
        where = f"{kind}, N = {offset}: {lens} at layer {best.layer}"
        gain = f"gain {best.gain:+.2f} {_interval(best.gain_interval)}, n = {best.n} pairs"
        if best.first_shots is None:
            sentences.append(
                f"{where}: no clear difference to the bigram at {best.most_shots} shots ({gain})."
            )
        else:
            sentences.append(
                f"{where} is above the bigram from {best.first_shots} shots on; at "
                f"{best.most_shots} shots {gain}."
            )
    beyond = [row for row in rows if row.part == BEYOND and row.layer is not None]
    above = [row for row in beyond if row.gain_interval[0] is not None and row.gain_interval[0] > 0]
    if beyond:
        sentences.append(
            f"Beyond the determined part, {len(above)} of {len(beyond)} readings are above the "
            "bigram with their interval; some 2.5 % would be by chance"
            + (": the format of what follows is foreseen, too." if above else ".")
        )
    return sentences


def _interval(interval: tuple[float | None, float | None]) -> str:
    """`[low, high]`, or that there is none."""
    low, high = interval
    return "[no interval]" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"


def _notes(sample: ShotSample, named: Mapping[str, Any], is_given: bool) -> list[str]:
    """What a reader must know about single figures."""
    notes = [
        "At N = 0 the bigram is that of the token at t; from N = 1 on it begins with the model's "
        "own distribution at t.",
        "The bigram that was given is the baseline."
        if is_given
        else "The bigram counts the train split of this cache.",
        "The largest offset of a text is its answer's length less one: large N have fewer pairs.",
        *describe_names(named),
    ]
    if note := sample.units.note:
        notes.append(note)
    inside = [sample.is_inside(0, sample.sources(0)).mean()]
    notes.append(f"{100 * inside[0]:.0f} % of the answer tokens are {INSIDE} the determined part.")
    if sample.units.count < FEW_DOCUMENTS:
        notes.append("Cells with few documents have intervals that are too narrow.")
    return notes
