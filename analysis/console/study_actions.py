"""Steps of the commands `residua study ...`: load cache and probes, run, write the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.files.disk_errors import check_target
from ...cache.optional_libraries import require_extra
from ...cache.store.catalog import find_cache
from ...probes.saved.library import find_probe, load_probe_for
from ..studies.essential_layers import EssentialLayers, study_essential_layers, write_csv
from .terminal import Meter


def run_essential_layers(
    cache: str,
    probes: Sequence[str],
    root: Path,
    quiet: bool,
    *,
    html: Path | None,
    png: Path | None,
    csv: Path | None,
    command: str | None = None,
    **options: Any,
) -> tuple[EssentialLayers, list[str]]:
    """Run the study on the cache named `cache`; returns the result and the paths written.

    The page quotes the command line `command`.
    """
    require_extra("fit", "the study")
    if html is not None or png is not None:
        require_extra("report", "a picture")
    for target in (html, png, csv):
        if target is not None:
            check_target(target)
    source = find_cache(cache, root)
    lenses = [load_probe_for(source, find_probe(name, root)) for name in probes]
    with Meter(quiet) as meter:
        result = study_essential_layers(
            source, lenses, progress=meter.progress_of("answers"), **options
        )
    written = []
    if csv is not None:
        written.append(str(write_csv(result, csv)))
    if html is not None or png is not None:
        from ..studies.essential_layers_page import (
            draw_essential_layers,
            write_essential_layers_page,
        )

        if html is not None:
            written.append(str(write_essential_layers_page(result, html, command)))
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            draw_essential_layers(result).savefig(png, dpi=150)
            written.append(str(png))
    return result, written
