"""Study `tuned-lens`: quality of lenses by layer, drift of the basis, and refinement of guesses.

Belrose et al., Eliciting Latent Predictions from Transformers with the Tuned Lens (2303.08112).
Each part has a file beside this one; all but layer transfer comes from one pass over the rows.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ....cache.devices import choose_device
from ....cache.errors import UsageError
from ....cache.progress import Auto, Progress, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.lens.logit_lens import LogitLens
from ...evaluation.lens_heatmap import WIDTH
from ...evaluation.probe_names import name_readouts
from ...token_texts.token_names import TokenNames
from ..prediction_depth.token_classes import count_tokens
from ..results.study_figures import StudyFigure
from ..results.study_result import StudyResult, StudySubject
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories
from .early_guesses import early_guess_rows
from .entropy_profiles import LabelledSequences, classifier_rows, profile_rows
from .layer_similarity import LayerPairRow, layer_pair_rows, read_covariances, spread_rows
from .layer_transfer import LayerTransferRow, drift_rows, is_affine, measure_transfer
from .lens_layers import lens_layer_rows
from .passage_cells import choose_passage, find_token, passage_rows, read_passage
from .quality_figures import (
    early_guess_figure,
    mean_trajectory_figure,
    passage_figures,
    profile_figure,
    quality_figure,
    similarity_figure,
    transfer_figure,
)
from .quality_sentences import (
    DOES_NOT_SAY,
    METHOD,
    QUESTION,
    classifier_sentences,
    drift_sentences,
    guess_sentences,
    quality_sentences,
)
from .quality_tables import quality_tables

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

MEASURES = (
    "entropy",
    "kl",
    "js",
    "total_variation",
    "cross_entropy",
    "max_probability",
    "rank",
    "text_rank",
)
"""Measures of trajectories that the study reads."""


def study_tuned_lens(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    transfer_positions: int = 1024,
    label: str | None = None,
    sequence: int | None = None,
    start: int | None = None,
    width: int = WIDTH,
    token: str | int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
    sample: PositionSample | None = None,
    readings: Mapping[str, Trajectories] | None = None,
) -> StudyResult:
    """Measure the logit lens and every given lens at every layer of `cache`.

    Translators of affine lenses are applied to all layers at `transfer_positions` positions (0:
    none). `label` names a label of sequences whose classes are compared by their entropy profiles.
    The passage of the heatmaps is `width` tokens of `sequence` from `start` on (default: a telling
    one); `token`, text or id, is tracked there. `sample` and `readings`, with marginals and
    `MEASURES`, are those of a caller that has them. Raises `UsageError` for a label without
    classes, a passage or token that is not there.
    """
    if transfer_positions < 0:
        raise UsageError(f"transfer positions are 0 or more, not {transfer_positions}")
    named = name_readouts(lenses, [LogitLens.of(cache, 0)])
    tracked = find_token(cache, token)
    passage = choose_passage(cache, split, sequence, start, width, device)
    if sample is None:
        sample = choose_positions(cache, split, max_positions, seed)
    labelled = None if label is None else LabelledSequences.of(sample, label)
    notes: list[str] = []

    with show_stages(progress) as report:
        # One pass over the rows, for all lenses and layers; and the passage.
        if readings is None:
            readings = measure_trajectories(
                sample,
                named,
                measures=MEASURES,
                marginals=True,
                device=device,
                progress=progress_of_stage(report, "trajectories"),
            )
        of_passage = progress_of_stage(report, "passage")
        in_passage = read_passage(cache, passage, named, tracked, device, of_passage)

        # How alike the layers are, and what translators do on other layers.
        pairs, spreads = _similarities(sample, progress_of_stage(report, "moments"), notes)
        transfer: list[LayerTransferRow] = []
        for name, lens in named.items():
            layers = readings[name].layers[:-1] if name in readings else ()
            if transfer_positions and is_affine(lens, layers):
                transfer += measure_transfer(
                    sample,
                    str(name),
                    lens,
                    layers,
                    positions=transfer_positions,
                    device=choose_device(device),
                    progress=progress_of_stage(report, f"transfer of {name}"),
                )
            elif transfer_positions and name != LogitLens.kind:
                notes.append(f"{name} has no affine map to the last layer: it is not transferred")
    layer_rows = lens_layer_rows(sample, readings)
    guesses = early_guess_rows(sample, readings, count_tokens(cache))
    cells = passage_rows(cache, passage, in_passage)
    drift = drift_rows(transfer, pairs, sample.seed)

    # Entropy profiles by class.
    profiles = [] if labelled is None else profile_rows(sample, readings, labelled)
    classifiers = [] if labelled is None else classifier_rows(sample, readings, labelled)

    says = quality_sentences(layer_rows, cache.n_blocks // 2)
    says += [*drift_sentences(drift, pairs), *guess_sentences(guesses)]
    says += classifier_sentences(classifiers, label or "")
    figures: list[StudyFigure] = [quality_figure(layer_rows), mean_trajectory_figure(layer_rows)]
    figures += passage_figures(cells, None if tracked is None else TokenNames(cache)(tracked))
    figures += [
        transfer_figure(lens, transfer, pairs)
        for lens in dict.fromkeys(row.lens for row in transfer)
    ]
    figures += [similarity_figure(pairs)] if pairs else []
    figures += [early_guess_figure(guesses)]
    figures += [profile_figure(profiles)] if profiles else []
    tables = quality_tables(
        {
            "layers": layer_rows,
            "early-guesses": guesses,
            "transfer": transfer,
            "drift": drift,
            "layer-pairs": pairs,
            "layer-spread": spreads,
            "profile-classifiers": classifiers,
            "profiles": profiles,
            "passage": cells,
        }
    )
    return StudyResult(
        study="tuned-lens",
        title=f"Lenses of {cache.manifest.model_name}, layer by layer",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject.of(
            cache,
            sample.split,
            n=sample.count,
            n_of="positions",
            units=sample.units.name,
            n_units=sample.units.count,
            probes={
                str(name): " ".join(repr(lens).split())
                for name, lens in named.items()
                if type(lens) is not LogitLens
            },
        ),
        tables=tables,
        figures=figures,
        says=says,
        does_not_say=DOES_NOT_SAY,
        notes=[*notes, *_notes(sample, readings)],
        settings={
            "split": sample.split,
            "seed": sample.seed,
            "transfer_positions": min(transfer_positions, sample.count),
            "label": label,
            "sequence": passage.sequence,
            "start": passage.start,
            "width": passage.width,
            "token": None if tracked is None else TokenNames(cache)(tracked),
        },
    )


def _similarities(
    sample: PositionSample, progress: Progress | None, notes: list[str]
) -> "tuple[Sequence[LayerPairRow], Sequence[object]]":
    """Rows of pairs of layers and of layers; none, with a note, without a train split."""
    try:
        covariances = read_covariances(sample.cache, progress)
    except UsageError as error:
        notes.append(f"no similarity of layers: {error}")
        return [], []
    if any(found.n < sample.cache.d_model for found in covariances.values()):
        notes.append(
            "covariances come from fewer positions than the residual stream has coordinates: "
            "similarities are rough"
        )
    return layer_pair_rows(sample, covariances), spread_rows(covariances)


def _notes(sample: PositionSample, readings: Mapping[str, Trajectories]) -> list[str]:
    """What a reader must know about the readings."""
    notes = [
        f"{name}: {lens.undefined} readings have logits that are not finite and are left out"
        for name, lens in readings.items()
        if lens.undefined
    ]
    if any(lens.marginal is None for lens in readings.values()):
        notes.append("no bias of mean distributions: the readings were made without marginals")
    if sample.units.note:
        notes.append(sample.units.note)
    return notes
