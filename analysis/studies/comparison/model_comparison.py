"""`study_compare`: two models on the same tokens, or several models by relative depth."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ....cache.errors import UsageError
from ....cache.progress import Auto, StageProgress
from ....probes.base.readout import Readout
from ..results.study_result import StudyResult
from .depth_curves import compare_by_depth
from .two_models import compare_two_models

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

WAYS = ("tokens", "depth")


def study_compare(
    caches: "Sequence[ActivationCache]",
    lenses: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    by: str | None = None,
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Compare the models of `caches`.

    `by="tokens"` compares the distributions of two models at the positions that both caches hold
    with the same tokens; `by="depth"` how well lenses read each model at relative depth l / L, of
    any models and texts. Two caches are compared by tokens unless `by` says otherwise, more by
    depth. Each of `lenses` goes with the caches of its own model; the logit lens is always read.

    Raises `UsageError` for caches that share no tokens (by tokens), and `MismatchError` for a lens
    of none of the models.
    """
    way = by or ("tokens" if len(caches) == 2 else "depth")
    if way not in WAYS:
        raise UsageError(f"models are compared by {' or '.join(WAYS)}, not by {way!r}")
    if len(caches) < 2 or (way == "tokens" and len(caches) != 2):
        raise UsageError(
            f"{len(caches)} cache{'s' * (len(caches) != 1)} given: by tokens two models are "
            "compared, by depth two or more"
        )
    if len({cache.id for cache in caches}) < len(caches):
        raise UsageError("a cache is given twice; name caches of different models")
    if way == "tokens":
        return compare_two_models(
            caches[0],
            caches[1],
            lenses,
            split=split,
            max_positions=max_positions,
            seed=seed,
            device=device,
            progress=progress,
        )
    return compare_by_depth(
        caches,
        lenses,
        split=split,
        max_positions=max_positions,
        seed=seed,
        device=device,
        progress=progress,
    )
