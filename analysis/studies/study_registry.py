"""All studies by name, and what each needs; `residua study all` runs those that a cache allows."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ...cache.function_above import PACKAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from .results.study_result import StudyResult


@dataclass(frozen=True)
class StudyEntry:
    """One study: where its function is, and when one cache is enough for it."""

    module: str
    """Module below `analysis.studies`, such as `tuned_lens.lens_quality`."""
    function: str
    """Name of the function `(cache, lenses, *, split, seed, device, progress, ...)`."""
    takes_readings: bool = False
    """Whether it takes `sample` and `readings`, which several studies share."""
    missing: str = ""
    """What a cache alone cannot give, with the command that would; empty if it may be enough."""

    def load(self) -> "Callable[..., StudyResult]":
        """The function of the study."""
        module = import_module(f"{PACKAGE}.analysis.studies.{self.module}")
        return getattr(module, self.function)


STUDIES: Mapping[str, StudyEntry] = {
    "compare": StudyEntry(
        "comparison.model_comparison",
        "study_compare",
        missing="compares two models: residua study compare CACHE CACHE",
    ),
    "essential-layers": StudyEntry("essential_layers.depth_study", "study_essential_layers"),
    "jacobian": StudyEntry(
        "jacobian.jacobian_study",
        "study_jacobian",
        missing="needs a file of a Jacobian lens: residua study jacobian CACHE LENS.pt",
    ),
    "transfer": StudyEntry(
        "comparison.lens_transfer",
        "study_transfer",
        missing="reads a probe on another cache: residua study transfer CACHE PROBE --to CACHE",
    ),
}
"""Name on the command line -> the study, in alphabetical order."""
