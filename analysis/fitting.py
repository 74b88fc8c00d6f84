"""Fits a probe as the command line does: a place that can be written, a cluster, a checkpoint."""

from pathlib import Path
from typing import Any

from ..cache.catalog import find_cache
from ..cache.cluster import connected
from ..cache.store import ActivationCache
from ..probes.control import controlled
from ..probes.library import checkpoint_path, new_place
from ..probes.save import save_probe
from .terminal import meter


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
    resumes: bool = True,
    **options: Any,
) -> tuple[ActivationCache, Any, Path]:
    """Fit `probe`, or its `control`, on the cache of that name; the cache, what was fitted, where.

    `stage` names what the progress counts, None for fits that say so themselves. A fit that
    `resumes` keeps a checkpoint under `root`. `options` are those of the probe's `fit`.
    """
    source, probe = find_cache(cache, root), controlled(probe, control)
    path = new_place(root, probe, source.id, out)
    if resumes:
        options["checkpoint"] = checkpoint_path(root, probe, source.id)
    with meter(quiet) as shown, connected(scheduler) as client:
        progress = shown.stage if stage is None else shown.of(stage)
        probe.fit(source, client=client, progress=progress, **options)
    return source, probe, save_probe(probe, path)
