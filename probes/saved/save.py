"""Probes on disk: a folder with `probe.safetensors` and `config.json`, never a pickle."""

import hashlib
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ... import __version__
from ...cache.errors import CorruptError, MismatchError, UsageError
from ...cache.files.json_files import make_folder, read_json, write_atomically, write_json
from ...cache.files.json_files import plain_value as plain_json
from ...cache.files.paths import as_path
from .kinds import KINDS, is_known, probe_class

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


FILES = ("config.json", "probe.safetensors")
"""What a saved probe consists of."""


class SavedProbe(Protocol):
    """What a probe offers to be kept on disk; `restore(params, config, tensors)` reads it back."""

    @property
    def kind(self) -> str:
        """One of `KINDS`, or one with a control: `ridge/shuffled`."""
        ...

    def get_params(self) -> dict[str, Any]:
        """The parameters of the constructor."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object with `cache`, `geometry`, `d_model`, `split` and `pairs`, and tensors."""
        ...


def save_probe(probe: SavedProbe, folder: str | Path) -> Path:
    """Write a fitted `probe` (see `SavedProbe`) to `folder`; tensors first, then `config.json`.

    Raises `UsageError` for a probe that holds NaN or an infinity.
    """
    from safetensors.numpy import save

    if not is_known(getattr(probe, "kind", None)):
        raise UsageError(f"{type(probe).__name__} cannot be saved; kinds are {', '.join(KINDS)}")
    config, tensors = probe.state()
    check_finite(tensors, f"the {probe.kind} probe")
    path = as_path(folder)
    make_folder(path)
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    write_atomically(path / "probe.safetensors", data)
    about = {
        "kind": probe.kind,
        "params": plain_params(probe.get_params()),
        "param_types": types_of(probe.get_params()),
        "residua": __version__,
        "tensors": hashlib.sha256(data).hexdigest(),
    }
    write_json(path / "config.json", {**plain_params(config), **about})
    return path


def load_probe(folder: str | Path) -> Any:
    """Read a probe of `save_probe`, without its cache; any changed byte raises `CorruptError`.

    Raises `UsageError` for a probe of another version, or one that holds NaN or an infinity.
    """
    from safetensors.numpy import load

    config, file = read_json(as_path(folder) / "config.json"), as_path(folder) / "probe.safetensors"
    data = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(data).hexdigest() != config.get("tensors"):
        raise CorruptError(f"{file} is missing or was changed after it was written; save it again")
    if not is_known(config.get("kind")):
        raise UsageError(
            f"{folder} holds a probe of kind {config.get('kind')!r}, written by residua "
            f"{config.get('residua')}; this version knows {', '.join(KINDS)}"
        )
    kind = probe_class(config["kind"])
    params = typed(config["params"], config.get("param_types", {}))
    # Copies: arrays of their own, aligned as numpy and torch align those of a fit.
    tensors = {name: value.copy() for name, value in load(data).items()}
    check_finite(tensors, str(file))
    return kind.restore(_known_scope(kind, params), config, tensors)


def _known_scope(kind: Any, params: dict[str, Any]) -> dict[str, Any]:
    """`params` with `across_documents`: probes that do not say were fitted to all pairs."""
    if isinstance(inner := params.get("probe"), dict):
        known = _known_scope(probe_class(inner["kind"]), inner["params"])
        return {**params, "probe": {**inner, "params": known}}
    if "across_documents" in signature(kind).parameters:
        return {"across_documents": True, **params}
    return params


def check_geometry(probe: Any, cache: "ActivationCache") -> None:
    """Raise `MismatchError` unless `cache` has the residual geometry that `probe` was fitted on."""
    if probe.n_features_in_ != cache.d_model:
        raise MismatchError(
            f"the probe reads residual streams of width {probe.n_features_in_}, this cache has "
            f"width {cache.d_model}; use a cache of the same model or fit a new probe"
        )
    found = cache.head.digest
    # A probe of arrays knows no head; its width is all there is to compare.
    if probe.geometry_ is not None and probe.geometry_ != found:
        raise MismatchError(
            f"the probe was fitted on a cache with head {probe.geometry_[:12]}, this cache has "
            f"head {found[:12]}; use a cache of the same model or fit a new probe"
        )


def check_belongs(probe: Any, cache: "ActivationCache", force: bool = False) -> None:
    """Raise unless `probe` can be read on `cache`: of the same model, and with finite tensors.

    `force` leaves out the head's digest, not the width. Readouts that know of no cache (a logit
    lens, one of a user's own) are of any model. Raises `MismatchError` or `UsageError`.
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
    check_finite(dict(_tensors_of(probe)), f"the {probe.kind} probe")


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raise `UsageError` that names the first of `tensors` with NaN or an infinity."""
    for name, tensor in tensors.items():
        # Penalties without held-out pairs have no error: that is what the NaN of a path says.
        if name.endswith(".path") or tensor.dtype.kind != "f":
            continue
        count = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if count:
            raise UsageError(
                f"{where}: tensor {name} holds {count} values of {tensor.size} that are not finite "
                "(NaN or infinite); the fit diverged: fit it again, with a smaller step (lr)"
            )


def _tensors_of(probe: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that `probe` reads residual streams with, by name; no copies."""
    probe = getattr(probe, "probe_", probe)
    for pair, found in getattr(probe, "maps_", {}).items():
        name = ".".join(map(str, pair))
        yield f"{name}.weight", found.weight
        yield f"{name}.bias", found.bias
    for pair, fitted in getattr(probe, "fitted_", {}).items():
        for name, tensor in fitted.parameters.items():
            yield f"{pair[0]}.{pair[1]}.{name}", tensor.numpy()


def feature_names(probe: Any) -> list[str] | None:
    """Names of the columns of a data frame that `probe` was fitted on; None for other rows."""
    names = getattr(probe, "feature_names_in_", None)
    return None if names is None else names.tolist()


def set_feature_names(probe: Any, names: list[str] | None) -> None:
    """Give a restored `probe` the names of `feature_names`."""
    if names is not None:
        probe.feature_names_in_ = np.array(names, object)


def types_of(params: dict[str, Any]) -> dict[str, Any]:
    """Types of those parameters that JSON would change: name -> type, and dtype of numpy's."""
    types: dict[str, Any] = {}
    for name, value in params.items():
        if hasattr(value, "get_params"):
            types[name] = types_of(value.get_params())
        elif isinstance(value, np.ndarray):
            types[name] = f"array {value.dtype.str}"
        elif isinstance(value, np.generic):
            types[name] = f"number {value.dtype.str}"
        elif isinstance(value, tuple | range):
            types[name] = type(value).__name__
    return types


def typed(params: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Parameters as they were before `plain`, by the `types` of `types_of`."""
    found = dict(params)
    for name, kind in types.items():
        value = params[name]
        if isinstance(kind, dict):
            found[name] = {**value, "params": typed(value["params"], kind)}
        elif kind == "tuple":
            found[name] = tuple(value)
        elif kind == "range":
            step = value[1] - value[0] if len(value) > 1 else 1
            last = value[-1] + (1 if step > 0 else -1) if value else 0
            found[name] = range(value[0], last, step) if value else range(0)
        else:
            form, dtype = kind.split()
            found[name] = np.array(value, dtype) if form == "array" else np.dtype(dtype).type(value)
    return found


def plain_params(value: Any) -> Any:
    """`value` as JSON has it, and a probe as its kind and parameters."""
    if hasattr(value, "get_params"):
        return {"kind": value.kind, "params": plain_params(value.get_params())}
    if isinstance(value, dict):
        return {key: plain_params(item) for key, item in value.items()}
    return plain_json(value)
