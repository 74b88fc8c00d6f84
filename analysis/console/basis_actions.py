"""Steps of `residua fit basis`: fit, influence in the model, readings, page and pictures."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.cluster import connected
from ...cache.errors import UsageError
from ...cache.files.json_files import json_digest
from ...cache.files.read_errors import read_file
from ...cache.number_ranges import absolute_numbers, as_tuple
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import find_cache
from ...probes.saved.library import (
    checkpoint_path,
    find_probe,
    load_probe_for,
    new_probe_path,
    probe_path,
)
from ...probes.saved.save import save_probe
from .actions import check_outputs
from .probe_names import LOGIT_LENS
from .terminal import Meter, format_bytes

if TYPE_CHECKING:
    from ...probes.basis.causal_basis import CausalBasis


@dataclass(frozen=True)
class BasisOutputs:
    """Where the results of `residua fit basis` go; None is left out."""

    probe: Path | None = None
    """Folder of the basis; default: under the root."""
    html: Path | None = None
    """Page on the directions."""
    png: Path | None = None
    """Folder of pictures."""
    command: str | None = None
    """Command line that the page quotes."""
    checkpoint: Path | None = None
    """Folder of the state of an unfinished fit; default: under the root."""


@dataclass(frozen=True)
class ModelChoice:
    """The model to ablate the bases in."""

    name: str
    """Folder or hub id."""
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class BasisResult:
    """What `residua fit basis` prints."""

    cache: ActivationCache
    basis: "CausalBasis"
    path: Path
    """Folder of the saved basis."""
    written: list[str]
    """Page and pictures."""


def fit_and_save_basis(
    basis: "CausalBasis",
    cache_name: str,
    lens_name: str,
    root: Path,
    quiet: bool,
    *,
    outputs: BasisOutputs,
    model: ModelChoice | None = None,
    scheduler: str | None = None,
    scratch: Path | None = None,
    memory: int | None = None,
    device: str = "auto",
) -> BasisResult:
    """Fit, measure and save `basis` on a cache with a lens, both by name, and write its page.

    With `model`, the same ablations are measured in the model. The basis is saved as soon as it
    is fitted; what is measured in the model is added to it.
    """
    # Find everything, and try the outputs, before the fit.
    cache = find_cache(cache_name, root)
    if basis.layers is not None:
        layers = as_tuple(basis.layers, "layers")
        basis.set_params(layers=absolute_numbers(layers, cache.n_blocks))
    lens, digest = load_lens(cache, lens_name, root, basis.offset)
    if model is not None:
        from ...cache.extraction.model_reload import find_cache_model

        if basis.offset:
            raise UsageError(
                "the influence in the model is measured at offset 0: leave out --model"
            )
        find_cache_model(cache, model.name, model.trust_remote_code)
    check_outputs(outputs.html, outputs.png)
    default = probe_path(root, basis, cache.id)
    path = new_probe_path(
        root, basis, cache.id, outputs.probe or default.with_name(f"{default.name}-{digest[:8]}")
    )
    checkpoint = checkpoint_path(root, basis, cache.id, outputs.checkpoint, suffix=f"-{digest[:8]}")
    if scratch is not None and not quiet and (size := basis.scratch_bytes(cache, memory)):
        print(f"scratch file: {format_bytes(size)} in {scratch}", file=sys.stderr)

    with Meter(quiet) as meter:
        with connected(scheduler) as client:
            basis.fit(
                cache,
                lens,
                client=client,
                memory=memory,
                scratch=scratch,
                checkpoint=checkpoint,
                progress=meter.stage,
                device=device,
            )
        save_probe(basis, path)
        influence = None
        if model is not None:
            influence = measure_in_model(cache, basis, lens, model, meter)
            save_probe(basis, path)
        written = write_basis_outputs(cache, basis, lens, influence, outputs, meter)
    return BasisResult(cache, basis, path, written)


def load_lens(cache: ActivationCache, name: str, root: Path, offset: int) -> tuple[Any, str]:
    """The lens `name` (a saved probe, or `logit`), and a digest that names it."""
    from ...probes.lens.logit_lens import LogitLens

    if name == LOGIT_LENS:
        return LogitLens.of(cache, offset), json_digest(LOGIT_LENS)
    path = find_probe(name, root)
    lens = load_probe_for(cache, path)
    return lens, json_digest(read_file(path / "config.json").decode())


def measure_in_model(
    cache: ActivationCache, basis: "CausalBasis", lens: Any, model: ModelChoice, meter: Meter
) -> dict[int, dict[str, Any]]:
    """Measure the influence of the bases in the model and add it to their metrics; by layer."""
    from ...cache.extraction.model_reload import load_model_of
    from ...probes.basis.causal_basis import lens_maps
    from ..basis.model_influence import measure_model_influence

    blocks = load_model_of(cache, model.name, model.device, model.trust_remote_code)
    influences = measure_model_influence(
        cache,
        basis.bases_,
        lens_maps(cache, lens, list(basis.bases_), basis.offset),
        blocks,
        controls={"pca": basis.pca_, "random": basis.random_},
        positions=basis.test_positions,
        seed=basis.seed,
        drop_first=basis.drop_first,
        progress=meter.progress_of("model"),
    )
    values = {layer: influence.to_json() for layer, influence in influences.items()}
    basis.add_measures(
        {
            layer: {
                "model_span": value["model_span"],
                "spearman": value["spearman"],
                "model": value,
            }
            for layer, value in values.items()
        }
    )
    return values


def write_basis_outputs(
    cache: ActivationCache,
    basis: "CausalBasis",
    lens: Any,
    influence: dict[int, dict[str, Any]] | None,
    outputs: BasisOutputs,
    meter: Meter,
) -> list[str]:
    """Write the page and the picture of `basis`; returns the paths."""
    if outputs.html is None and outputs.png is None:
        return []
    from ...probes.basis.causal_basis import lens_maps
    from ..basis.direction_readings import read_directions
    from ..basis_report.basis_page import write_basis_png, write_basis_report

    rows = basis.metrics()
    written = []
    if outputs.html is not None:
        readings = read_directions(
            cache,
            basis.bases_,
            lens_maps(cache, lens, list(basis.bases_), basis.offset),
            rows_of_metrics=rows,
            seed=basis.seed,
            drop_first=basis.drop_first,
            progress=meter.progress_of("readings"),
        )
        outputs.html.parent.mkdir(parents=True, exist_ok=True)
        page = write_basis_report(
            outputs.html,
            rows=rows,
            readings=readings,
            model_influence=influence,
            cache=cache,
            command=outputs.command,
        )
        written.append(str(page))
    if outputs.png is not None:
        outputs.png.mkdir(parents=True, exist_ok=True)
        name = cache.manifest.model_name
        picture = outputs.png / "basis-spectra.png"
        write_basis_png(picture, rows=rows, model_influence=influence, model_name=name)
        written.append(str(picture))
    return written
