"""`config.json` of a saved probe, read as what it is: a stranger's file.

`read_config` checks the fields that all kinds have; `with_param_types` and `constructor_params`
make keywords of a constructor from the saved parameters. `load_probe` (`save.py`) calls them, and
names the file where the restored class refuses a value.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import CorruptError, ResiduaError, UsageError
from ...cache.files.json_fields import (
    FieldError,
    as_object,
    as_text,
    checking_fields,
    digest_field,
    integer_field,
    list_field,
    object_field,
    optional_field,
    required_field,
    shown,
    text_field,
)
from ...cache.files.json_files import read_json
from ...cache.format.manifest import MAX_DEPTH
from .kinds import KINDS, is_known, probe_class

CONTENT = "the configuration of a probe of this format"
MAX_FEATURES = 1 << 24
"""Most columns of the rows that a probe reads."""
MAX_OFFSET = 1 << 31
"""Bound of offsets."""
ARRAY_BYTES = 64 << 20
"""Most bytes of an array among the parameters or classes."""
NUMPY_DTYPE = re.compile(r"[<>|=]?([biuf][0-9]{1,2}|U[0-9]{1,5}|O)")
"""dtypes of parameters and classes: numbers, words, and Python's objects of JSON."""


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` at `path`, with the fields checked that all kinds have.

    Raises `CorruptError` for a changed or malformed file, `UsageError` for an unknown kind.
    """
    config = read_json(path)
    with checking_fields(path, CONTENT):
        kind, version = text_field(config, "kind"), config.get("residua")
        if not is_known(kind):
            raise UsageError(
                f"{path.parent} holds a probe of kind {shown(kind)}, written by residua "
                f"{shown(version)}; this version knows {', '.join(KINDS)}"
            )
        text_field(config, "residua")
        digest_field(config, "tensors")
        check_params(object_field(config, "params"), with_probe="/" in kind)
        _check_types(config.get("param_types", {}))
        _check_fit(config)
        if "/" in kind:
            _check_fit(object_field(config, "fitted"))
    return config


def check_params(params: dict[str, Any], with_probe: bool) -> None:
    """Raise `FieldError` for parameters without a probe where a control has one."""
    if with_probe:
        probe = object_field(params, "probe")
        if text_field(probe, "kind") not in KINDS:
            raise FieldError(f"the probe of a control is of kind {shown(probe['kind'])}")
        object_field(probe, "params")


def _check_types(types: Any, where: str = "param_types") -> None:
    """Raise `FieldError` unless `types` are as `save.param_types` gives them."""
    for name, value in as_object(types, where).items():
        if isinstance(value, dict):
            _check_types(value, name)
            continue
        container, _, dtype = as_text(value, name).partition(" ")
        if value not in ("tuple", "range") and (
            container not in ("array", "number") or not NUMPY_DTYPE.fullmatch(dtype)
        ):
            raise FieldError(f"the type of {name} is {shown(value)}")


def _check_fit(config: dict[str, Any]) -> None:
    """Raise `FieldError` unless `config` says on what a probe was fitted, and for which pairs."""
    for name in ("cache", "geometry", "split"):
        required_field(config, name)
        optional_field(text_field, config, name)
    integer_field(config, "d_model", 1, MAX_FEATURES)
    for row in list_field(config, "pairs"):
        row = as_object(row, "a pair")
        optional_field(integer_field, row, "layer", 0, MAX_DEPTH)
        if "target" in row:
            optional_field(integer_field, row, "target", 0, MAX_DEPTH)
        integer_field(row, "offset", 0, MAX_OFFSET)
    names = optional_field(list_field, config, "feature_names")
    for name in names or ():
        as_text(name, "feature_names")


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Name the file in errors of a class whose restoring computes with values of a config.

    Raises `CorruptError` for Python's errors, which values of other types and ranges give.
    """
    try:
        with checking_fields(path, CONTENT):
            yield
    except ResiduaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptError(f"{path} is not {CONTENT}: {reason}") from None


def constructor_params(kind: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `saved_params`: keywords for the class `kind`, also of a probe inside.

    Probes that were saved without `across_documents` were fitted to all pairs.
    """
    today = {saved: name for name, saved in getattr(kind, "names_on_disk", {}).items()}
    params = {today.get(name, name): value for name, value in params.items()}
    if isinstance(base := params.get("probe"), dict):
        base_params = constructor_params(probe_class(base["kind"]), base["params"])
        return {**params, "probe": {**base, "params": base_params}}
    if "across_documents" in signature(kind).parameters:
        return {"across_documents": True, **params}
    return params


def with_param_types(params: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Saved `params` in the types that `param_types` recorded before they became JSON."""
    typed_params = dict(params)
    for name, type_name in types.items():
        value = params[name]
        if isinstance(type_name, dict):
            base_params = with_param_types(value["params"], type_name)
            typed_params[name] = {**value, "params": base_params}
        elif type_name == "tuple":
            typed_params[name] = tuple(value)
        elif type_name == "range":
            step = value[1] - value[0] if len(value) > 1 else 1
            stop = value[-1] + (1 if step > 0 else -1) if value else 0
            typed_params[name] = range(value[0], stop, step) if value else range(0)
        else:
            container, dtype = type_name.split()
            typed_params[name] = (
                array_of(value, dtype, name)
                if container == "array"
                else np.dtype(dtype).type(value)
            )
    return typed_params


def array_of(values: Any, dtype: str | None, name: str) -> np.ndarray:
    """The array of JSON `values` with a numpy `dtype`; None lets numpy choose.

    Raises `FieldError` for another dtype than those of parameters and classes, and for an array
    whose words would be longer than the file is large.
    """
    if dtype is not None:
        if not isinstance(dtype, str) or not NUMPY_DTYPE.fullmatch(dtype):
            raise FieldError(f"the dtype of {name} is {shown(dtype)}")
        count = len(values) if isinstance(values, list) else 1
        if count * np.dtype(dtype).itemsize > ARRAY_BYTES:
            raise FieldError(f"{name} has {count} values of dtype {dtype}")
    return np.array(values, dtype)
