"""All studies by name, and what each needs; `residua study all` runs those that a cache allows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...cache.errors import NotFoundError
from ...cache.function_above import PACKAGE
from ...probes.base.readout import Readout

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache
    from .results.study_result import StudyResult


@dataclass(frozen=True)
class StudyEntry:
    """One study: where its function is, and what it reads."""

    module: str
    """Module below `analysis.studies`, such as `tuned_lens.lens_quality`."""
    function: str
    """Name of the function `(cache, lenses, *, split, seed, device, progress, ...) ->
    StudyResult`."""
    probes: str = "lenses"
    """What of the given probes it reads: `lenses`, which read layers at offset 0, or `all`."""
    takes_readings: bool = False
    """Whether it takes `sample` and `readings`, which several studies share."""
    takes_positions: bool = True
    """Whether it takes `max_positions`."""
    caches: tuple[str, ...] = ()
    """Arguments of its command that name more caches: `CACHE`, or `NAME=CACHE`."""
    split: str | None = None
    """Split that it reads whatever the others read; None for theirs."""
    missing: str = ""
    """What one cache and its probes can never give, with the command that does; else empty."""

    def load(self) -> "Callable[..., StudyResult]":
        """The function of the study."""
        module = import_module(f"{PACKAGE}.analysis.studies.{self.module}")
        return getattr(module, self.function)


STUDIES: Mapping[str, StudyEntry] = {
    "anomaly": StudyEntry("anomaly.anomaly_study", "study_anomaly", split="all"),
    "compare": StudyEntry(
        "comparison.model_comparison",
        "study_compare",
        caches=("beside",),
        missing="it compares models: residua study compare CACHE CACHE",
    ),
    "depth": StudyEntry(
        "prediction_depth.prediction_depth_study",
        "study_prediction_depth",
        takes_readings=True,
        caches=("step",),
    ),
    "essential-layers": StudyEntry(
        "essential_layers.depth_study", "study_essential_layers", takes_positions=False, split="all"
    ),
    "future-lens": StudyEntry("future_lens.study_offsets", "study_future_lens", probes="all"),
    "icl": StudyEntry("in_context.shot_study", "study_in_context", probes="all"),
    "jacobian": StudyEntry("jacobian.jacobian_study", "study_jacobian"),
    "transfer": StudyEntry(
        "comparison.lens_transfer",
        "study_transfer",
        caches=("to",),
        missing="it reads a probe on another cache: residua study transfer CACHE PROBE --to CACHE",
    ),
    "tuned-lens": StudyEntry("tuned_lens.lens_quality", "study_tuned_lens", takes_readings=True),
    "vision": StudyEntry("vision.class_token_study", "study_vision", takes_readings=True),
}
"""Name on the command line -> the study, in alphabetical order."""


def study(
    name: str,
    cache: "ActivationCache",
    probes: Sequence[Readout] | Mapping[str, Readout] = (),
    **options: Any,
) -> "StudyResult":
    """Make the study `name` of `cache` and `probes`, as `residua study NAME` does.

    `options` are those of the study's own function, such as `split`, `max_positions`, `seed`,
    `device` and `progress`. Raises `NotFoundError` for an unknown name, and what the study raises.
    """
    if name not in STUDIES:
        raise NotFoundError(f"there is no study {name!r}; studies are {', '.join(STUDIES)}")
    return STUDIES[name].load()(cache, probes, **options)
