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
    "essential-layers": StudyEntry("essential_layers.depth_study", "study_essential_layers"),
    "future-lens": StudyEntry("future_lens.study_offsets", "study_future_lens"),
}
"""Name on the command line -> the study, in alphabetical order."""
