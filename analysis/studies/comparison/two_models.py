"""Two models on the same tokens: how much their predictions differ, where, and from which depth.

The comparison of distributions token by token follows model-diff (Huang et al., 2412.12177);
`model_divergence.py` measures, `divergence_rows.py` makes the tables, `state_similarity.py`
compares residual streams.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....cache.format.manifest import SHORT_ID
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ...evaluation.probe_names import describe_names, name_readouts
from ..results.study_result import StudyResult, StudySubject, StudyTable
from .divergence_figures import describe_divergence, draw_depths, draw_similarity
from .divergence_rows import (
    DEPTH_HEADINGS,
    GROUP_HEADINGS,
    PARTING_HEADINGS,
    PASSAGE_HEADINGS,
    SIMILARITY_HEADINGS,
    TOKEN_HEADINGS,
    DivergenceTables,
    SimilarityRow,
    known_value,
)
from .joined_sequences import join_caches
from .lens_pairs import layers_at_offset_0, pair_lenses
from .model_divergence import measure_divergence, pair_layers
from .state_similarity import similarity_matrix

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

QUESTION = (
    "At which tokens do two models predict something else on the same text, by how much, and from "
    "which depth on?"
)
METHOD = (
    "Both models' distributions over the next token are compared at every position that both "
    "caches hold (joined by digests of their token sequences): top tokens, KL both ways, and the "
    "Jensen-Shannon divergence (JS, at most ln 2 = 0.693 nats), after model-diff (2412.12177). At "
    "each pair of layers of equal relative depth the same is done for a lens of each model; the "
    "models part at the first layer whose mean JS is more than half of the final one. Linear CKA "
    "(1905.00414) compares the residual streams. Intervals (95 %) resample documents."
)
DOES_NOT_SAY = (
    "It does not say which model is right; a difference of cross-entropy says which predicts this "
    "text better.",
    "It does not say what causes a difference: a lens shows where one becomes visible to the lens, "
    "and a lens that reads one model worse than the other makes a divergence of its own.",
    "Layers of equal relative depth need not do the same work in models of different depth.",
)


def compare_two_models(
    first: "ActivationCache",
    other: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Compare two models on the tokens that both caches hold, see `study_compare`."""
    sample = join_caches(first, other, split, max_positions, seed)
    named = name_readouts(lenses)
    paired, notes = pair_lenses(first, other, named)
    pairs = {
        name: pair_layers(first, other, [layers_at_offset_0(lens, cache) for lens, cache in both])
        for name, both in (
            (name, tuple(zip(of_both, (first, other), strict=True)))
            for name, of_both in paired.items()
        )
    }
    layers = first.layers, other.layers
    with show_stages(progress) as report:
        found = measure_divergence(
            sample, paired, pairs, device=device, progress=progress_of_stage(report, "divergence")
        )
        cka, cka_rows = similarity_matrix(
            sample, layers, progress=progress_of_stage(report, "similarity")
        )
    tables = DivergenceTables(sample, found)
    depth_rows, parting = tables.depth_rows(), tables.parting_rows()
    groups = tables.group_rows()
    names = tuple(model_label(cache) for cache in (first, other))
    subject = StudySubject(
        caches=(first.id, other.id),
        model_name=f"{names[0]} and {names[1]}",
        data_name=first.manifest.data_name,
        split=split,
        n=sample.first.count,
        n_of="positions",
        units=sample.first.units.name,
        n_units=sample.first.units.count,
        probes={str(name): repr(probe) for name, probe in named.items()},
    )
    undefined = int(np.isnan(found.js).sum())
    notes += [
        f"{sample.shares[0]:.1%} of the first cache's positions of the split and "
        f"{sample.shares[1]:.1%} of the other's hold the same tokens; the others are left out"
    ] * (min(sample.shares) < 1)
    computed = [cache.manifest.capture.compute_dtype for cache in (first, other)]
    notes += [
        f"the models were computed in {computed[0]} and {computed[1]}, which alone makes states "
        "differ; save both models with weights of one dtype, and extract them again"
    ] * (computed[0] != computed[1])
    notes += [f"{undefined:,} positions have logits that are no distribution"] * (undefined > 0)
    notes += [sample.first.units.note] * bool(sample.first.units.note)
    notes += [
        f"CKA of {cka_rows:,} positions and width {first.d_model}: too few positions raise it"
    ] * (cka_rows < 5 * first.d_model)
    notes += describe_names(named)
    return StudyResult(
        study="compare",
        title=f"{names[0]} beside {names[1]}",
        question=QUESTION,
        method=METHOD,
        subject=subject,
        tables=[
            StudyTable(
                "groups", "How much the models differ, by next token", GROUP_HEADINGS, groups
            ),
            StudyTable("depths", "A lens of each model, by depth", DEPTH_HEADINGS, depth_rows),
            StudyTable("parting", "Where the models part", PARTING_HEADINGS, parting),
            StudyTable(
                "tokens", "Next tokens of most difference", TOKEN_HEADINGS, tables.token_rows()
            ),
            StudyTable(
                "passages", "Passages of most difference", PASSAGE_HEADINGS, tables.passage_rows()
            ),
            StudyTable(
                "similarity",
                "Linear CKA of residual streams",
                SIMILARITY_HEADINGS,
                [
                    SimilarityRow(a, b, known_value(float(cka[i, j])), cka_rows)
                    for i, a in enumerate(layers[0])
                    for j, b in enumerate(layers[1])
                ],
                most_shown=0,
            ),
        ],
        figures=[
            draw_depths(depth_rows, groups, names),
            draw_similarity(cka, layers, names, cka_rows),
        ],
        says=describe_divergence(groups, parting, depth_rows, names),
        does_not_say=DOES_NOT_SAY,
        notes=notes,
        settings={"max_positions": max_positions, "seed": seed, "by": "tokens"},
    )


def model_label(cache: "ActivationCache") -> str:
    """The model's name; the last folder of a path."""
    return cache.manifest.model_name.rstrip("/").rpartition("/")[2] or cache.id[:SHORT_ID]
