"""`study_vision`: class tokens and patches of a cache of images, read by lenses at every layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import NotFoundError, UsageError
from ....cache.number_ranges import as_whole_number
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout, check_readout
from ....probes.lens.logit_lens import LogitLens
from ....probes.saved.save import check_belongs
from ...evaluation.probe_names import name_readouts, probe_list
from ...token_texts.token_names import read_class_names
from ..results.study_result import StudyResult, StudySubject
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories
from .class_labels import LabelClasses, label_classes
from .vision_rows import PatchMaps, patch_maps, patch_rows, vision_rows
from .vision_texts import (
    METHOD,
    NOT_SAID,
    QUESTION,
    StudiedImage,
    layer_figure,
    patch_figure,
    vision_sentences,
    vision_tables,
)

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache

MEASURES = ("entropy", "kl", "max_probability")
"""Measures of the class tokens."""


def study_vision(
    cache: "ActivationCache",
    lenses: Readout | Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    image: int | None = None,
    label: str | None = None,
    seed: int = 0,
    device: "str | torch.device" = "auto",
    sample: PositionSample | None = None,
    readings: Mapping[str, Trajectories] | None = None,
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Read the class token of each image, and the patches of one, by the logit lens and `lenses`.

    `max_positions` class tokens of `split` are read. `image` is the number of the sequence whose
    patches are shown (default: the first that was read); a cache of class tokens alone shows none.
    `label` names the classes of the images (default: `label`, if the cache has it). `sample` and
    `readings` of the lenses are read where they are known already.

    Raises `UsageError` for a cache of texts, and for an image of a cache without patches,
    `NotFoundError` for a label or an image that the cache lacks, `MismatchError` for lenses of
    another model.
    """
    grid = cache.manifest.image_grid
    if grid is None:
        raise UsageError(
            "this cache is of texts; the study reads a cache of images: residua extract MODEL "
            "IMAGES, with an image classifier and a folder of images"
        )
    listed = probe_list(lenses)
    for lens in listed:
        check_readout(lens)
        check_belongs(lens, cache, False)
    has_logit_lens = any(isinstance(lens, LogitLens) for lens in listed)
    named = name_readouts(
        lenses if isinstance(lenses, Mapping) else listed,
        () if has_logit_lens else (LogitLens.of(cache, (0,)),),
    )
    labels = label_classes(cache, label)
    sample = sample or choose_positions(cache, split, max_positions, seed)
    has_patches = not cache.has("context/ids")
    studied = _choose_image(cache, sample, image, labels, has_patches)

    with show_stages(progress) as report:
        if readings is None:
            readings = measure_trajectories(
                sample,
                named,
                measures=MEASURES,
                device=device,
                progress=progress_of_stage(report, "class tokens"),
            )
        maps: list[PatchMaps] = []
        if studied is not None:
            of_image = measure_trajectories(
                PositionSample(cache, "all", np.array([studied.sequence]), seed),
                named,
                measures=("entropy",),
                tracked=studied.class_id,
                device=device,
                progress=progress_of_stage(report, "patches"),
            )
            maps = [patch_maps(found, grid) for found in of_image.values()]

    rows = vision_rows(sample, readings, labels.classes[sample.sequence_numbers])
    patches = [] if studied is None else [r for m in maps for r in patch_rows(m, studied.class_id)]
    names = read_class_names(cache)
    is_labelled = any(row.labelled for row in rows)
    figures = [layer_figure(rows, cache.vocab, is_labelled)]
    if studied is not None:
        figures.append(patch_figure(maps[-1], studied, names))
    return StudyResult(
        study="vision",
        title=f"Images as {cache.manifest.model_name} reads them",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            split,
            n=sample.count,
            n_of="images",
            units=sample.units.name,
            n_units=sample.units.count,
            probes={str(name): lens.kind for name, lens in named.items() if lens in listed},
        ),
        tables=vision_tables(rows, patches, studied),
        figures=figures,
        says=vision_sentences(rows, _kl_differences(sample, readings), studied, patches),
        does_not_say=NOT_SAID,
        notes=_notes(labels, sample, readings, has_patches),
        settings={
            "max_positions": max_positions,
            "image": None if studied is None else studied.sequence,
            "label": labels.name,
            "seed": seed,
        },
    )


def _choose_image(
    cache: "ActivationCache",
    sample: PositionSample,
    image: int | None,
    labels: LabelClasses,
    has_patches: bool,
) -> StudiedImage | None:
    """The image whose patches are read, with the model's class; None without patches."""
    if not has_patches:
        if image is not None:
            raise UsageError(
                f"this cache keeps {cache.manifest.capture.positions!r} of the positions of an "
                "image, and no whole image; extract with --positions all"
            )
        return None
    count = len(cache.sequence_length)
    sequence = int(sample.sequences[0]) if image is None else as_whole_number(image, "image")
    if not 0 <= sequence < count:
        raise NotFoundError(f"there is no image {sequence}; the cache holds images 0-{count - 1}")
    first = int(cache.sequence_start[sequence])
    logits = cache.head.logits(cache.residual_array(cache.n_blocks)[first : first + 1])[0]
    if not np.isfinite(logits.max()):
        raise UsageError(f"the model's logits of image {sequence} are not finite; choose another")
    class_id, names = int(logits.argmax()), read_class_names(cache)
    of_label = int(labels.classes[sequence])
    name = f"image {sequence}"
    if "file" in cache.label_names:
        name = str(cache.label("file")[sequence]) or name
    return StudiedImage(
        sequence=sequence,
        name=name,
        label=names[of_label] if of_label >= 0 else "",
        class_id=class_id,
        class_name=names[class_id],
    )


def _kl_differences(
    sample: PositionSample, readings: Mapping[str, Trajectories]
) -> dict[str, tuple[int, float | None, tuple[float | None, float | None]]]:
    """Of each lens but the logit lens: its middle layer, and its KL minus the logit lens's."""
    found = {}
    logit = next((r for name, r in readings.items() if str(name).startswith("logit")), None)
    for name, reading in readings.items():
        if logit is None or reading is logit:
            continue
        common = [layer for layer in reading.layers[:-1] if layer in logit.layers]
        if not common:
            continue
        layer = common[len(common) // 2]
        own, other = (r.values["kl"][:, r.column(layer)].astype(float) for r in (reading, logit))
        found[str(name)] = (layer, *sample.mean(own - other))
    return found


def _notes(
    labels: LabelClasses,
    sample: PositionSample,
    readings: Mapping[str, Trajectories],
    has_patches: bool,
) -> list[str]:
    """What a reader must know about single figures."""
    notes = [*labels.notes]
    if sample.units.note:
        notes.append(sample.units.note)
    undefined = {str(name): found.undefined for name, found in readings.items() if found.undefined}
    if undefined:
        listed = ", ".join(f"{name} {count}" for name, count in undefined.items())
        notes.append(f"readings without a distribution (NaN, +inf) are left out: {listed}")
    if not has_patches:
        notes.append("the cache keeps no whole image: maps need extract --positions all")
    if any(not str(name).startswith("logit") for name in readings):
        notes.append(
            "Lenses that were fitted on all positions of a cache have read mostly patches; fit "
            "them on a cache of --positions cls for the class token."
        )
    return notes
