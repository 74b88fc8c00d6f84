"""Steps of the commands `residua fit` and `residua evaluate` that several commands share.

`fit_and_save` fits a probe on a cache and saves the probe under the root; `write_outputs` writes
the report and the pictures of an evaluation.
"""

from pathlib import Path
from typing import Any

from ...cache.cluster import connected
from ...cache.errors import UsageError
from ...cache.files.disk_errors import check_file_target, check_target
from ...cache.number_ranges import absolute_numbers
from ...cache.optional_libraries import require_extra
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import find_cache
from ...probes.controls.control_probe import as_control
from ...probes.saved.library import checkpoint_path, new_probe_path
from ...probes.saved.save import save_probe
from ..evaluation.result import Evaluation
from .terminal import Meter


def fit_and_save(
    probe: Any,
    cache: str,
    root: Path,
    quiet: bool,
    *,
    stage: str | None = None,
    control: str | None = None,
    scheduler: str | None = None,
    out: Path | None = None,
    checkpoint: Path | None = None,
    resumes: bool = True,
    **options: Any,
) -> tuple[ActivationCache, Any, Path]:
    """Fit `probe`, or its `control`, on the cache named `cache`, and save the probe.

    Returns the cache, the fitted probe and its folder: `out`, or a folder under `root`. `stage`
    names the stage that progress counts, None for a fit that names its own stages. A fit that
    `resumes` keeps a checkpoint in the folder `checkpoint`, by default under `root`. `scheduler` is
    the address of a dask scheduler; `options` are those of the probe's `fit`.
    """
    source = find_cache(cache, root)
    for name in ("layers", "target"):
        if (layers := getattr(probe, name, None)) is not None:
            probe.set_params(**{name: absolute_numbers(layers, source.n_blocks)})
    probe = as_control(probe, control)
    # Raises before the fit if the folder cannot be written.
    folder = new_probe_path(root, probe, source.id, out)
    if resumes:
        options["checkpoint"] = checkpoint_path(root, probe, source.id, checkpoint)
    with Meter(quiet) as meter, connected(scheduler) as client:
        progress = meter.stage if stage is None else meter.progress_of(stage)
        probe.fit(source, client=client, progress=progress, **options)
    return source, probe, save_probe(probe, folder)


def check_outputs(html: Path | None, png: Path | None) -> None:
    """Raise `UsageError` unless a report can be written to `html` and pictures below `png`.

    `MissingLibraryError`, one of these, names the extra whose libraries draw them.
    """
    if html is not None or png is not None:
        require_extra("report", "a report")
    if html is not None:
        if html.suffix.lower() not in ("", ".html", ".htm"):
            raise UsageError(
                f"a report is a web page, not {html.suffix}: name it {html.with_suffix('.html')}; "
                "--png takes a folder for pictures, and a browser prints the page as .pdf"
            )
        check_file_target(html, "report.html")
    if png is not None:
        if png.suffix.lower() in (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".html"):
            raise UsageError(f"--png takes a folder for several pictures, such as {png.stem}")
        check_target(png / "lenses.png")


def write_outputs(
    evaluation: Evaluation, html: Path | None, png: Path | None, command: str | None = None
) -> list[str]:
    """Write the report to `html` and the pictures to the folder `png`; return the paths written.

    The report quotes the command line `command`.
    """
    if html is None and png is None:
        return []
    from ..display.evaluation_plots import write_evaluation_pngs
    from ..report.html_report import PASSAGES, write_report

    heatmaps = evaluation.heatmaps(passages=PASSAGES)
    written = []
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        written.append(str(write_report(evaluation, html, heatmaps=heatmaps, command=command)))
    if png is not None:
        first = [found for found in heatmaps if found.sequence == heatmaps[0].sequence]
        written += [str(path) for path in write_evaluation_pngs(evaluation, png, first)]
    return written
