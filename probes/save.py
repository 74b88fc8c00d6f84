"""Probes on disk: a folder with `probe.safetensors` and `config.json`, never a pickle."""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import __version__
from ..cache.errors import CorruptError, MismatchError, UsageError
from ..cache.jsonfile import make_folder, read_json, write_atomically, write_json
from ..cache.place import as_path

if TYPE_CHECKING:
    from ..cache.store import ActivationCache

KINDS = {
    "bigram": (".bigram", "Bigram"),
    "chain": (".chain", "BigramChain"),
    "future": (".lens", "FutureLens"),
    "lagged": (".bigram", "LaggedBigram"),
    "lens": (".lens", "TunedLens"),
    "marginal": (".chain", "MarginalBigram"),
    "ridge": (".ridge", "RidgeProbe"),
    "trigram": (".trigram", "Trigram"),
    "unigram": (".unigram", "Unigram"),
    "vocab": (".vocab", "VocabProbe"),
}
"""Module and class of each kind of probe; imported when one is loaded."""


FILES = ("config.json", "probe.safetensors")
"""What a saved probe consists of."""


class Saved(Protocol):
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


def save_probe(probe: Saved, folder: str | Path) -> Path:
    """Write a fitted `probe` (see `Saved`) to `folder`; tensors first, then `config.json`."""
    from safetensors.numpy import save

    if not is_known(getattr(probe, "kind", None)):
        raise UsageError(f"{type(probe).__name__} cannot be saved; kinds are {', '.join(KINDS)}")
    config, tensors = probe.state()
    path = as_path(folder)
    make_folder(path)
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    write_atomically(path / "probe.safetensors", data)
    about = {
        "kind": probe.kind,
        "params": plain(probe.get_params()),
        "param_types": types_of(probe.get_params()),
        "residua": __version__,
        "tensors": hashlib.sha256(data).hexdigest(),
    }
    write_json(path / "config.json", {**plain(config), **about})
    return path


def load_probe(folder: str | Path) -> Any:
    """Read a probe of `save_probe`, without its cache; any changed byte raises `CorruptError`."""
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
    params = typed(config["params"], config.get("param_types", {}))
    # Copies: arrays of their own, aligned as numpy and torch align those of a fit.
    tensors = {name: value.copy() for name, value in load(data).items()}
    return class_of(config["kind"]).restore(params, config, tensors)


def is_known(kind: Any) -> bool:
    """Whether `kind` is one of `KINDS`, or one of them with a control: `ridge/shuffled`."""
    return isinstance(kind, str) and kind.partition("/")[0] in KINDS


def class_of(kind: str) -> Any:
    """The class of a known kind of probe."""
    module, name = (".control", "ControlProbe") if "/" in kind else KINDS[kind]
    return getattr(import_module(module, __package__), name)


def check_geometry(probe: Any, cache: "ActivationCache") -> None:
    """Raise `MismatchError` unless `cache` has the residual geometry that `probe` was fitted on."""
    if probe.n_features_in_ != cache.d_model:
        raise MismatchError(
            f"the probe reads residual streams of width {probe.n_features_in_}, this cache has "
            f"width {cache.d_model}; use a cache of the same model or fit a new probe"
        )
    found = cache.head.geometry
    # A probe of arrays knows no head; its width is all there is to compare.
    if probe.geometry_ is not None and probe.geometry_ != found:
        raise MismatchError(
            f"the probe was fitted on a cache with head {probe.geometry_[:12]}, this cache has "
            f"head {found[:12]}; use a cache of the same model or fit a new probe"
        )


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


def plain(value: Any) -> Any:
    """`value` with numpy's numbers, arrays and tuples as JSON's, and a probe as its parameters."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "get_params"):
        return {"kind": value.kind, "params": plain(value.get_params())}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value
