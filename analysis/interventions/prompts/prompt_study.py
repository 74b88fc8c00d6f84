"""What prompts read of cached states of later tokens (Future Lens, 2311.04897): `study_prompts`.

Prompts are run by `prompt_readings.py`, rows are made in `prompt_rows.py`, sentences and figures in
`prompt_texts.py`, the picture of a passage in `passage_picture.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.errors import UsageError
from ....cache.number_ranges import absolute_numbers, as_tuple
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.baselines.ngrams import Bigram
from ....probes.controls.control_probe import ControlProbe
from ....probes.prompts.learned_prompt import LearnedPrompt, model_of_cache
from ....probes.prompts.patched_prompt import FIXED_PROMPTS, SIMLENS, PatchedPrompt, read_prompt
from ....probes.prompts.prompt_runner import check_context
from ....probes.prompts.prompt_sample import PromptSample
from ....probes.vocabulary.vocab_probe import VocabProbe
from ...evaluation.probe_names import name_readouts
from ...studies.results.study_figures import StudyFigure
from ...studies.results.study_result import StudyResult, StudySubject
from ...studies.trajectories.position_sample import PositionSample
from .passage_picture import passage_figure, read_passage
from .prompt_readings import PromptEntry, PromptMeter, PromptReading, ReadingKey, other_samples
from .prompt_rows import PromptRow, Rivals, prompt_row, rival_row
from .prompt_texts import (
    METHOD,
    NOT_SAID,
    QUESTION,
    describe_offsets,
    precision_figure,
    prompt_tables,
    surprisal_figure,
)

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

DEFAULT_PROMPTS = (*FIXED_PROMPTS, SIMLENS)
"""The prompts that are read where none are given."""
NEXT_TOKEN = "vocab/next-token"
"""Kind of the vocabulary probe of state and next token."""
MOST_GENERATED = 4
"""Tokens in a cell of the picture of a passage."""


def study_prompts(
    cache: "ActivationCache",
    lenses: Sequence[Any] | Mapping[str, Any] = (),
    *,
    prompts: Sequence[str | PatchedPrompt] = DEFAULT_PROMPTS,
    layers: int | Sequence[int] | None = None,
    offsets: int | Sequence[int] = (0, 1, 2, 3),
    target_layer: int | None = None,
    free: bool = False,
    rivals: bool = True,
    where: np.ndarray | None = None,
    split: str = "test",
    max_positions: int = 1024,
    passage: int | None = None,
    passage_tokens: int = 16,
    model: Any = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Put cached states into `prompts`, and compare what the model says with what it said in place.

    `lenses` are fitted `LearnedPrompt`s, read at their layers and offsets, and probes to compare
    with. `prompts` are texts, `PatchedPrompt`s, or `simlens` (a start token and the state's own
    token). States of `layers` (default: all of the cache) are put in at the same layer, or at
    `target_layer`. `free` adds readings without the text's tokens. Unless `rivals` is off, a bigram
    and a vocabulary probe of [state; embedding of the next token] are fitted on the train split and
    stand beside each row.
    `where` is a bool mask over the positions t, of which at most `max_positions` are drawn.
    `passage` is the number of a sequence to draw (default: the first of the split), of which
    `passage_tokens` tokens are shown; 0 leaves the picture out. `model` is the folder, hub id or
    loaded model of the cache; default the one it was extracted from.

    Raises `UsageError` for a split without positions, `NotFoundError` for missing layers,
    `MismatchError` for a model or prompts of another model.
    """
    learned, readouts = _separate(lenses)
    layer_numbers, offset_numbers = _numbers(cache, layers, offsets, target_layer)
    for probe in learned.values():
        probe.check_model(cache)
    resumable = model_of_cache(cache, model, device, trust_remote_code)
    sample = PromptSample.draw(
        cache, split, max(offset_numbers), max_positions, seed=seed, where=where
    )
    places = _places(sample, seed)
    fixed = [
        prompt if isinstance(prompt, PatchedPrompt) else read_prompt(prompt, cache)
        for prompt in prompts
    ]
    entries = _entries(fixed, learned, layer_numbers, offset_numbers, target_layer)
    for entry in entries:
        check_context(resumable, entry.prompt.length + max(offset_numbers))
    named = name_readouts(readouts)
    with show_stages(progress) as show:
        beside = _with_rivals(
            cache,
            named,
            layer_numbers,
            offset_numbers,
            wanted=rivals,
            show=show,
            device=device,
        )
        meter = PromptMeter(
            sample, resumable, offset_numbers, other_samples(places.unit_numbers, seed)
        )
        report = progress_of_stage(show, "prompts")

        def report_samples(done: int) -> None:
            if report is not None:
                report(done, sample.count)

        readings = meter.measure(
            entries, beside.probes, layer_numbers, free=free, report=report_samples
        )
        rows = _rows(readings, entries, [prompt.name for prompt in fixed], places, beside.names)
        others = [
            rival_row(key, reading, places)
            for key, reading in readings.items()
            if key.mode == "probe"
        ]
        figures: list[StudyFigure] = [
            precision_figure(rows, others, beside.names, cache.n_blocks),
            surprisal_figure(rows, others, beside.names),
        ]
        if passage_tokens:
            picture_of = _picture_prompt(fixed, learned, layer_numbers)
            cells = read_passage(
                cache,
                resumable,
                picture_of,
                sequence=_passage_sequence(cache, split, passage),
                tokens=passage_tokens,
                generated=MOST_GENERATED,
                target_layer=target_layer,
            )
            figures.append(passage_figure(cells))
    return StudyResult(
        study="prompt",
        title=f"What prompts read of the states of {cache.manifest.model_name}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=sample.count,
            n_of="positions",
            units=places.units.name,
            n_units=places.units.count,
            probes={str(name): probe.kind for name, probe in {**learned, **named}.items()},
        ),
        tables=prompt_tables(rows, others),
        figures=figures,
        says=describe_offsets(rows, others, beside.names),
        does_not_say=NOT_SAID,
        notes=_notes(rows, places, resumable, entries),
        settings={
            "prompts": [prompt.name for prompt in fixed],
            "layers": list(layer_numbers),
            "offsets": list(offset_numbers),
            "target_layer": target_layer,
            "seed": seed,
            "max_positions": max_positions,
            "masked": where is not None,
        },
    )


@dataclass(frozen=True)
class _Beside:
    """The probes that are read at the same samples."""

    probes: dict[str, Readout]
    names: Rivals


def _separate(
    lenses: Sequence[Any] | Mapping[str, Any],
) -> tuple[dict[str, LearnedPrompt], Any]:
    """Learned prompts by name, and the other probes as they were given."""
    if isinstance(lenses, Mapping):
        learned = {str(k): v for k, v in lenses.items() if isinstance(v, LearnedPrompt)}
        return learned, {k: v for k, v in lenses.items() if not isinstance(v, LearnedPrompt)}
    found = [probe for probe in lenses if isinstance(probe, LearnedPrompt)]
    names = ["learned", *(f"learned {number}" for number in range(2, len(found) + 1))]
    others = [probe for probe in lenses if not isinstance(probe, LearnedPrompt)]
    return dict(zip(names, found, strict=False)), others


def _numbers(
    cache: "ActivationCache",
    layers: int | Sequence[int] | None,
    offsets: int | Sequence[int],
    target_layer: int | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers and offsets, ascending; raises for those that the cache cannot have."""
    given = as_tuple(cache.layers if layers is None else layers, "layers")
    layer_numbers = tuple(sorted(set(absolute_numbers(given, cache.n_blocks) or ())))
    for layer in (*layer_numbers, cache.n_blocks):
        cache.residual_array(layer)
    offset_numbers = tuple(sorted(set(as_tuple(offsets, "offsets"))))
    if not layer_numbers or not offset_numbers or min(offset_numbers) < 0:
        raise UsageError("give at least one layer, and offsets of 0 or more")
    if target_layer is not None and not 0 <= target_layer <= cache.n_blocks:
        raise UsageError(
            f"states can be put in at layers 0 to {cache.n_blocks}, not {target_layer}"
        )
    return layer_numbers, offset_numbers


def _places(sample: PromptSample, seed: int) -> PositionSample:
    """The positions with their documents, which intervals resample."""
    mask = np.zeros(sample.cache.positions, bool)
    mask[sample.positions] = True
    sequences = sample.cache.sequences(sample.split)
    sequences = sequences[sample.cache.sequence_length[sequences] > 0]
    return PositionSample(sample.cache, sample.split, sequences, seed, mask)


def _entries(
    fixed: Sequence[PatchedPrompt],
    learned: Mapping[str, LearnedPrompt],
    layers: Sequence[int],
    offsets: Sequence[int],
    target_layer: int | None,
) -> list[PromptEntry]:
    """All prompts with the layers that they read."""
    entries = [
        PromptEntry(
            prompt.name,
            prompt,
            layer,
            layer if target_layer is None else target_layer,
            tuple(offsets),
        )
        for prompt in fixed
        for layer in layers
    ]
    for name, probe in learned.items():
        for layer, offset in probe.pairs():
            if layer in layers and offset in offsets:
                target = layer if target_layer is None else target_layer
                prompt = probe.prompt(layer, offset)
                entries.append(PromptEntry(name, prompt, layer, target, (offset,)))
    if not entries:
        raise UsageError(
            "there is no prompt to read: give texts, or learned prompts of these layers and offsets"
        )
    return entries


def _with_rivals(
    cache: "ActivationCache",
    named: Mapping[str, Readout],
    layers: Sequence[int],
    offsets: Sequence[int],
    *,
    wanted: bool,
    show: StageProgress | None,
    device: str,
) -> _Beside:
    """The given probes, with a bigram and a probe of state and next token."""
    probes = dict(named)
    kinds = {probe.kind: str(name) for name, probe in named.items()}
    later = tuple(offset for offset in offsets if offset >= 1)
    if wanted and later:
        if "bigram" not in kinds:
            probes["bigram"] = Bigram(later).fit(cache, progress=progress_of_stage(show, "count"))
            kinds["bigram"] = "bigram"
        if NEXT_TOKEN not in kinds:
            vocab = VocabProbe(offsets=later, layers=tuple(layers))
            probes[NEXT_TOKEN] = ControlProbe(vocab, "next-token").fit(
                cache, progress=progress_of_stage(show, "vocab"), device=device
            )
            kinds[NEXT_TOKEN] = NEXT_TOKEN
    return _Beside(probes, Rivals(kinds.get(NEXT_TOKEN), kinds.get("bigram")))


def _rows(
    readings: Mapping[ReadingKey, PromptReading],
    entries: Sequence[PromptEntry],
    fixed: Sequence[str],
    places: PositionSample,
    rivals: Rivals,
) -> list[PromptRow]:
    """Rows by offset, prompt and layer; the mean of several written prompts first."""
    keys = [key for key in readings if key.mode != "probe" and not key.is_shuffled]
    written = [name for name in fixed if name != SIMLENS]
    places_of: dict[tuple[Any, ...], list[ReadingKey]] = {}
    for key in keys:
        if key.name in written:
            place = (key.offset, key.mode, key.layer, key.target_layer)
            places_of.setdefault(place, []).append(key)
    rows = []
    if len(written) > 1:
        name = f"mean of {len(written)} written"
        rows += [prompt_row(name, found, readings, places, rivals) for found in places_of.values()]
    rows += [prompt_row(key.name, [key], readings, places, rivals) for key in keys]
    order = {name: number for number, name in enumerate(dict.fromkeys(row.prompt for row in rows))}
    learned_first = {entry.name for entry in entries} - set(fixed)
    return sorted(
        rows,
        key=lambda row: (
            row.offset,
            row.mode,
            row.prompt not in learned_first,
            order[row.prompt],
            row.layer,
        ),
    )


def _picture_prompt(
    fixed: Sequence[PatchedPrompt],
    learned: Mapping[str, LearnedPrompt],
    layers: Sequence[int],
) -> dict[int, PatchedPrompt]:
    """The prompt of each layer of the picture: learned, of the least offset, else written."""
    if not learned:
        return dict.fromkeys(layers, fixed[0])
    probe = next(iter(learned.values()))
    found: dict[int, PatchedPrompt] = {}
    for layer, offset in sorted(probe.pairs()):
        if layer in layers and layer not in found:
            found[layer] = probe.prompt(layer, offset)
    return found or dict.fromkeys(layers, fixed[0])


def _passage_sequence(cache: "ActivationCache", split: str, passage: int | None) -> int:
    """Number of the sequence to draw; raises `UsageError` for one that does not exist."""
    if passage is None:
        sequences = cache.sequences(split)
        return int(sequences[np.argmax(cache.sequence_length[sequences] > 1)])
    if not 0 <= passage < len(cache.sequence_length):
        raise UsageError(
            f"the cache has sequences 0 to {len(cache.sequence_length) - 1}, not {passage}"
        )
    return passage


def _notes(
    rows: Sequence[PromptRow], places: PositionSample, model: Any, entries: Sequence[PromptEntry]
) -> list[str]:
    """What a reader must know about the figures."""
    notes = [
        "Behind the prompt the model sees the prompt's own last token at the layers below the one "
        "that takes the state.",
        "The layer of the largest gain is chosen on the positions that are measured: read the "
        "curve beside it.",
    ]
    if places.units.note:
        notes.append(places.units.note)
    full = sorted({e.target_layer for e in entries if not model.can_resume(e.target_layer)})
    if full:
        notes.append(
            f"This model cannot be resumed from layers {full}: all of its blocks ran for each "
            "state."
        )
    undefined = sum(places.count - row.n for row in rows)
    if undefined:
        notes.append(f"{undefined} readings have logits that are not finite; they do not count.")
    return notes
