"""Probes on disk: a folder with `probe.safetensors` and `config.json`, never a pickle."""

import hashlib
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import __version__
from ..cache.errors import CorruptError, MismatchError, UsageError
from ..cache.jsonfile import read_json, write_atomically, write_json
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
    path.mkdir(parents=True, exist_ok=True)
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    write_atomically(path / "probe.safetensors", data)
    about = {
        "kind": probe.kind,
        "params": plain(probe.get_params()),
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
    kind = class_of(config["kind"])
    return kind.restore(_known_scope(kind, config["params"]), config, load(data))


def _known_scope(kind: Any, params: dict[str, Any]) -> dict[str, Any]:
    """`params` with `across_documents`: probes that do not say were fitted to all pairs."""
    if isinstance(inner := params.get("probe"), dict):
        known = _known_scope(class_of(inner["kind"]), inner["params"])
        return {**params, "probe": {**inner, "params": known}}
    if "across_documents" in signature(kind).parameters:
        return {"across_documents": True, **params}
    return params


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
