"""Saves and loads fitted probes: a folder with `probe.safetensors` and `config.json`, no pickle.

Every kind of probe offers `kind`, `get_params`, `state` and `restore` (see `SavedProbe`);
`kinds.py` maps a kind to its class, `library.py` names folders under a root, `hub.py` shares
them. Tensors are checked by sha256 when they are read, and must be finite.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...cache.errors import CorruptError, MismatchError, UsageError
from ...cache.files.json_files import (
    make_folder,
    plain_value,
    write_atomically,
    write_json,
)
from ...cache.files.paths import as_path, is_remote
from ...cache.files.read_errors import read_file
from ...cache.files.staging import (
    exchange_folder,
    publish_folder,
    staging_folder,
    sweep_staging,
)
from ...cache.number_ranges import format_ranges
from ..base.saved_tensors import SavedTensors
from .config_file import constructor_params, read_config, restoring, with_param_types
from .kinds import KINDS, is_known, probe_class

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


FILES = ("config.json", "probe.safetensors")
"""Files of a saved probe."""
STAGING_PREFIX = ".residua-probe-"
"""Beginning of the names of folders that are filled beside those of saved probes."""


class SavedProbe(Protocol):
    """A probe to save; `restore(params, config, tensors)` of the class reads the probe back."""

    @property
    def kind(self) -> str:
        """A key of `KINDS`, alone or with a control behind it: `ridge/shuffled`."""
        ...

    def get_params(self) -> dict[str, Any]:
        """The parameters of the constructor."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object with `cache`, `geometry`, `d_model`, `split` and `pairs`, and tensors."""
        ...


def save_probe(probe: SavedProbe, folder: str | Path) -> Path:
    """Write a fitted `probe` to `folder` and return the path.

    A new probe appears whole, and one that replaces another at once: readers, and who comes after
    a crash, find the old one or the new one. Only in a folder that holds other files too, or was
    there and empty, the two files are replaced one after the other, the tensors first. Raises
    `UsageError` for a probe that holds NaN or an infinity.
    """
    from safetensors.numpy import save

    if not is_known(getattr(probe, "kind", None)):
        raise UsageError(f"{type(probe).__name__} cannot be saved; kinds are {', '.join(KINDS)}")
    config, tensors = probe.state()
    check_finite(tensors, f"the {probe.kind} probe")
    path = as_path(folder)
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    about = {
        "kind": probe.kind,
        "params": saved_params(probe),
        "param_types": param_types(probe),
        "residua": package_version(),
        "tensors": hashlib.sha256(data).hexdigest(),
    }
    write_probe(path, data, {**plain_value(config), **about})
    return path


def write_probe(path: Path, data: bytes, config: dict[str, Any]) -> None:
    """Write the two files of a probe, tensors `data` and `config`, to the folder `path`."""
    if is_remote(path) or not _write_folder(path, data, config):
        make_folder(path)
        _write_files(path, data, config)


def _write_files(folder: Path, data: bytes, config: dict[str, Any]) -> None:
    """Write both files of a probe into `folder`, durably, the tensors first."""
    write_atomically(folder / "probe.safetensors", data)
    write_json(folder / "config.json", config)


def _write_folder(path: Path, data: bytes, config: dict[str, Any]) -> bool:
    """Fill a folder beside `path` with a probe, and give it the name `path`.

    False, with nothing written, if `path` is no folder of a probe alone, is the current folder, or
    its name cannot be exchanged.
    """
    exists = path.exists() or path.is_symlink()
    if exists:
        is_plain = path.is_dir() and not path.is_symlink()
        if not is_plain or {file.name for file in path.iterdir()} != set(FILES):
            return False
        if path.samefile(os.curdir) or not os.access(path.parent, os.W_OK | os.X_OK):
            return False
    make_folder(path.parent)
    sweep_staging(path.parent, f"{STAGING_PREFIX}*.tmp")
    with staging_folder(path.parent, STAGING_PREFIX, ".tmp") as staging:
        _write_files(staging, data, config)
        if exists:
            return exchange_folder(staging, path)
        publish_folder(staging, path)
    return True


def load_probe(folder: str | Path) -> Any:
    """Read a probe that `save_probe` wrote, without its cache.

    Raises `CorruptError` for any changed byte and for values that no fit gives, `UsageError` for a
    probe of an unknown kind or with NaN or an infinity.
    """
    # Read both files, and check that the tensors are those of the config.
    path, file = as_path(folder) / "config.json", as_path(folder) / "probe.safetensors"
    config = read_config(path)
    while hashlib.sha256(data := _read_tensors(file)).hexdigest() != config.get("tensors"):
        # Perhaps the probe was replaced between the two reads: then the config is another now.
        config, earlier_config = read_config(path), config
        if config == earlier_config:
            raise CorruptError(
                f"{file} is missing or was changed after it was written; save it again"
            )
    tensors = SavedTensors.parse(data, file)
    check_finite(tensors, str(file))
    # Give the class its parameters, in their types and under today's names.
    kind = probe_class(config["kind"])
    with restoring(path):
        params = with_param_types(config["params"], config.get("param_types", {}))
        probe = kind.restore(constructor_params(kind, params), config, tensors)
    # Evaluations tell probes of one kind apart by their folders.
    probe.folder_ = str(path.parent)
    return probe


def _read_tensors(file: Path) -> bytes:
    """The bytes of a probe's tensors; none if the file is missing."""
    try:
        return read_file(file)
    except (FileNotFoundError, IsADirectoryError):
        return b""


def package_version() -> str:
    """Version of the installed package; `unknown` where only its source files are there."""
    try:
        return version("residua")
    except PackageNotFoundError:
        return "unknown"


def saved_params(probe: Any) -> dict[str, Any]:
    """Constructor parameters of `probe` as in `config.json`; a probe inside as kind and params.

    A parameter of `later_params` is left out where it has its default: so a probe of an earlier
    version, loaded and saved again, has the same bytes.
    """

    def saved_value(value: Any) -> Any:
        if hasattr(value, "get_params"):
            return {"kind": value.kind, "params": saved_params(value)}
        return plain_value(value)

    later = getattr(probe, "later_params", {})
    return {
        _saved_name(probe, name): saved_value(value)
        for name, value in probe.get_params().items()
        if name not in later or value != later[name]
    }


def _saved_name(probe: Any, name: str) -> str:
    """Key in `config.json` of a parameter: its first name, where it was renamed later."""
    return getattr(probe, "names_on_disk", {}).get(name, name)


def param_types(probe: Any) -> dict[str, Any]:
    """Types of the parameters that JSON would change, by their key in `config.json`."""
    types: dict[str, Any] = {}
    for parameter, value in probe.get_params().items():
        name = _saved_name(probe, parameter)
        if hasattr(value, "get_params"):
            types[name] = param_types(value)
        elif isinstance(value, np.ndarray):
            types[name] = f"array {value.dtype.str}"
        elif isinstance(value, np.generic):
            types[name] = f"number {value.dtype.str}"
        elif isinstance(value, tuple | range):
            types[name] = type(value).__name__
    return types


def check_belongs(probe: Any, cache: "ActivationCache", force: bool = False) -> None:
    """Raise unless `probe` can be read on `cache`: of the same model, and with finite tensors.

    `force` accepts another head, never another width. Readouts without a cache of their own (a
    logit lens, a user's readout) belong to every model. Raises `MismatchError` or `UsageError`.
    """
    if hasattr(probe, "geometry_") and hasattr(probe, "n_features_in_"):
        try:
            check_geometry(probe, cache)
        except MismatchError as error:
            if not force or probe.n_features_in_ != cache.d_model:
                raise MismatchError(f"{probe.kind}: {error}") from None
    classes = getattr(probe, "classes_", None)
    if classes is not None and not np.array_equal(classes, np.arange(cache.vocab)):
        raise MismatchError(
            f"{probe.kind}: the probe knows {len(classes)} classes that are not the {cache.vocab} "
            "tokens of this cache; fit it on a cache of the same model"
        )
    check_widths(probe, cache)
    check_finite(dict(_tensors_of(probe)), f"the {probe.kind} probe")


def check_widths(probe: Any, cache: "ActivationCache") -> None:
    """Raise `MismatchError` if the maps or counts of `probe` give no state or logits of `cache`."""
    allowed = {cache.d_model}
    if (control := getattr(probe, "probe_", None)) is not None:
        # The view of a control may have other rows, of which the head reads a part.
        probe, allowed = control, {cache.d_model, control.n_features_in_}
    widths = {affine.weight.shape[1] for affine in getattr(probe, "maps_", {}).values()}
    if getattr(probe, "form", None) in ("head", "mlp"):
        widths |= {len(fit.parameters["bias"]) for fit in getattr(probe, "fitted_", {}).values()}
    if not widths <= allowed:
        raise MismatchError(
            f"{probe.kind}: the probe gives states of width {format_ranges(sorted(widths))}, the "
            f"head of this cache reads {cache.d_model}; fit it on a cache of the same model"
        )
    unigram = getattr(probe, "unigram_", None)
    if unigram is not None and len(unigram) != cache.vocab:
        raise MismatchError(
            f"{probe.kind}: the probe counted {len(unigram)} tokens, this cache has {cache.vocab}; "
            "fit it on a cache of the same model"
        )


def check_geometry(probe: Any, cache: "ActivationCache") -> None:
    """Raise `MismatchError` unless `cache` has the width and the head that `probe` was fitted on.

    A probe of arrays has no head: only the width is compared.
    """
    if probe.n_features_in_ != cache.d_model:
        raise MismatchError(
            f"the probe reads residual streams of width {probe.n_features_in_}, this cache has "
            f"width {cache.d_model}; use a cache of the same model or fit a new probe"
        )
    digest = cache.head.digest
    if probe.geometry_ is not None and probe.geometry_ != digest:
        raise MismatchError(
            f"the probe was fitted on a cache with head {probe.geometry_[:12]}, this cache has "
            f"head {digest[:12]}; use a cache of the same model or fit a new probe"
        )


def _tensors_of(probe: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every fitted tensor that reads residual streams; no copies."""
    probe = getattr(probe, "probe_", probe)
    for key, affine in getattr(probe, "maps_", {}).items():
        name = ".".join(map(str, key))
        yield f"{name}.weight", affine.weight
        yield f"{name}.bias", affine.bias
    for (layer, offset), fitted in getattr(probe, "fitted_", {}).items():
        for name, tensor in fitted.parameters.items():
            yield f"{layer}.{offset}.{name}", tensor.numpy()


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raise `UsageError` that names the first of `tensors` with NaN or an infinity."""
    for name, tensor in tensors.items():
        # NaN on a penalty path is legitimate: without held-out pairs, penalties have no error.
        if name.endswith(".path") or tensor.dtype.kind != "f":
            continue
        count = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if count:
            raise UsageError(
                f"{where}: tensor {name} holds {count} values of {tensor.size} that are not finite "
                "(NaN or infinite); the fit diverged: fit it again, with a smaller step (lr)"
            )


def feature_names(probe: Any) -> list[str] | None:
    """Names of the columns of a data frame that `probe` was fitted on; None for other rows."""
    names = getattr(probe, "feature_names_in_", None)
    return None if names is None else names.tolist()


def set_feature_names(probe: Any, names: list[str] | None) -> None:
    """Give a restored `probe` the names of `feature_names`."""
    if names is not None:
        probe.feature_names_in_ = np.array(names, object)
