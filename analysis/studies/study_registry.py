"""All studies by name, and what each needs; `residua study all` runs those that a cache allows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ...cache.function_above import PACKAGE

if TYPE_CHECKING:
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
    "tuned-lens": StudyEntry("tuned_lens.lens_quality", "study_tuned_lens", takes_readings=True),
}
"""Name on the command line -> the study, in alphabetical order."""
