"""`residua study all`: every study that a cache and its probes allow, and why not the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import ResiduaError
from ...cache.files.json_files import make_folder
from ...cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ...probes.base.readout import Readout
from ...probes.lens.logit_lens import LogitLens
from ..evaluation.probe_names import name_readouts
from .results.study_result import StudyResult
from .study_registry import STUDIES, StudyEntry
from .trajectories.position_sample import PositionSample, choose_positions
from .trajectories.readings import Trajectories, measure_trajectories

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

STAGE = "studies"
"""Stage of the progress that counts studies."""


@dataclass(frozen=True)
class AllStudies:
    """What `run_all_studies` found."""

    results: Sequence[StudyResult]
    """Results of the studies that could be made, in the order of their names."""
    skipped: Mapping[str, str]
    """Name of each other study -> the reason, and the command that would answer it."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua study all`."""
        return {
            "studies": {result.study: result.to_dict() for result in self.results},
            "skipped": dict(self.skipped),
        }

    def write_html(self, path: str | Path, command: str | None = None) -> Path:
        """Write one page of all studies to `path` (extra `report`)."""
        from ...cache.optional_libraries import require_library
        from .results.study_page import write_study_page

        require_library("plotly", "a page")
        make_folder(Path(path).parent)
        return write_study_page(self.results, Path(path), command, self.skipped)


def run_all_studies(
    cache: "ActivationCache",
    probes: Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> AllStudies:
    """Make every study of `STUDIES` that `cache` and `probes` allow.

    Studies of lenses share one sample of positions and one pass over their rows. A study that
    raises an error of the package (a `ResiduaError`) is skipped with the error's message. Raises
    `UsageError` for an empty split.
    """
    named = name_readouts(probes)
    lenses = {name: probe for name, probe in named.items() if _reads_next_token(probe)}
    with show_stages(progress) as report:
        sample = choose_positions(cache, split, max_positions, seed)
        shared: dict[str, Any] = {}
        if any(entry.takes_readings for entry in STUDIES.values()):
            readings = _read_lenses(cache, sample, lenses, device, report)
            shared = {"sample": sample, "readings": readings}
        results: list[StudyResult] = []
        skipped: dict[str, str] = {}
        options = {"split": split, "seed": seed, "device": device}
        for number, (name, entry) in enumerate(STUDIES.items()):
            if entry.missing:
                skipped[name] = entry.missing
            else:
                try:
                    results.append(
                        entry.load()(
                            cache,
                            dict(named if entry.probes == "all" else lenses),
                            progress=report,
                            **options | _own_options(entry, max_positions, shared),
                        )
                    )
                except ResiduaError as error:
                    skipped[name] = str(error)
            if report is not None:
                report(STAGE, number + 1, len(STUDIES))
    return AllStudies(results, skipped)


def _own_options(
    entry: StudyEntry, max_positions: int, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of one study beside those of all."""
    options: dict[str, Any] = {}
    if entry.takes_positions:
        options["max_positions"] = max_positions
    if entry.takes_readings:
        options |= shared
    if entry.split is not None:
        options["split"] = entry.split
    return options


def _reads_next_token(probe: Readout) -> bool:
    """Whether `probe` reads a layer at offset 0, as a lens does."""
    return any(layer is not None and offset == 0 for layer, offset in probe.pairs())


def _read_lenses(
    cache: "ActivationCache",
    sample: PositionSample,
    lenses: Mapping[str, Readout],
    device: str,
    report: StageProgress | None,
) -> dict[str, Trajectories]:
    """Readings of the logit lens and of `lenses`, in one pass."""
    named = name_readouts(dict(lenses), [LogitLens.of(cache, 0)])
    return measure_trajectories(
        sample,
        named,
        marginals=True,
        device=device,
        progress=progress_of_stage(report, "trajectories"),
    )
