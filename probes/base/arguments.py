"""Checks and casts of rows and labels that users give to `fit` and `predict`: numpy, dask, torch.

`RidgeProbe`, `TunedLens` and `VocabProbe` call these before they look at any value; whatever can
not be used is refused by a message that says what to do.
"""

import warnings
from typing import Any

import numpy as np

from ...cache.errors import InputTypeError, ResiduaWarning, UsageError
from ...cache.number_ranges import format_ranges

NUMBERS = "biuf"
"""Kinds of numpy dtypes that rows may have: bool, signed, unsigned, floating."""
LABELS = "biufU"
"""Kinds of numpy dtypes that labels may have: those of rows, and strings."""


def is_dask(values: Any) -> bool:
    """Whether `values` are a dask array; dask itself is not imported."""
    return hasattr(values, "dask") and hasattr(values, "chunks")


def as_array(values: Any, name: str, known_length: bool = True, kinds: str = NUMBERS) -> Any:
    """`values` as a numpy or lazy dask array; tensors of torch become numpy.

    Lists and data frames are returned unchanged: scikit-learn converts them. `name` appears in
    messages. Raises `InputTypeError` for masked arrays, lazy objects other than dask arrays and
    dtypes that are not of `kinds`; `UsageError` for chunks of unknown size if the number of rows
    must be known (`known_length`).
    """
    if is_dask(values):
        return _checked_dask_array(values, name, known_length, kinds)
    if hasattr(values, "__dask_graph__"):
        raise InputTypeError(
            f"{name} is a {_type_name(values)}; give a dask array: "
            f"{name}.to_dask_array(lengths=True) of a dask frame, {name}.data of an xarray"
        )
    if type(values).__module__.partition(".")[0] == "torch":
        values = values.detach().cpu()
        # numpy has no bfloat16, and half precision is too narrow for sums.
        is_small_float = values.is_floating_point() and values.itemsize < 4
        values = (values.float() if is_small_float else values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.is_masked(values):
            raise InputTypeError(f"{name} has masked values: {_how_to_unmask(name)}")
        values = np.ma.getdata(values)
    if isinstance(values, np.ndarray):
        values = _small_floats_as_float32(values)
        # scikit-learn tries to read objects as numbers, and has its own message for complex ones.
        if values.dtype.kind not in f"{kinds}Oc":
            raise InputTypeError(_dtype_message(name, values.dtype, kinds))
    return values


def _checked_dask_array(values: Any, name: str, known_length: bool, kinds: str) -> Any:
    """A dask array of plain numpy blocks; raises as `as_array` does."""
    meta = values._meta
    if isinstance(meta, np.ma.MaskedArray):
        raise InputTypeError(f"{name} is a dask array of masked blocks: {_how_to_unmask(name)}")
    if not isinstance(meta, np.ndarray):
        raise InputTypeError(
            f"{name} is a dask array of {_type_name(meta)}; its blocks must be numpy arrays: "
            f"{name}.map_blocks(np.asarray)"
        )
    if values.dtype.kind == "V":
        values = values.map_blocks(_small_floats_as_float32, dtype=np.float32)
    if values.dtype.kind not in kinds:
        raise InputTypeError(_dtype_message(name, values.dtype, kinds))
    if known_length and np.isnan(values.shape).any():
        raise UsageError(
            f"{name} has chunks of unknown size, shape {values.shape}: call "
            f"{name}.compute_chunk_sizes() first"
        )
    return values


def _small_floats_as_float32(values: np.ndarray) -> np.ndarray:
    """Floats of dtypes that other packages add to numpy, such as bfloat16, as float32."""
    is_float = values.dtype.kind == "V" and "float" in values.dtype.name
    return values.astype(np.float32) if is_float else values


def _how_to_unmask(name: str) -> str:
    return f"fill them, {name}.filled(value) (dask: da.ma.filled), or leave out their rows"


def _dtype_message(name: str, dtype: Any, kinds: str) -> str:
    expected = "numbers or strings" if kinds == LABELS else "numbers"
    if dtype.kind == "c":
        return f"Complex data not supported: {name} has dtype {dtype}; give real numbers"
    return (
        f"{name} must hold {expected}, not {dtype}; convert it, for example with {name}.astype(...)"
    )


def _type_name(value: Any) -> str:
    """Package and class of `value`, for messages."""
    return f"{type(value).__module__.partition('.')[0]} {type(value).__name__}"


def validated(estimator: Any, *arrays: Any, **options: Any) -> Any:
    """scikit-learn's `validate_data`, with errors raised as `UsageError` in the same words."""
    from .estimator import validate_data

    try:
        return validate_data(estimator, *arrays, **options)
    except TypeError as error:
        raise InputTypeError(str(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_dask(X: Any, y: Any) -> tuple[Any, Any]:
    """`X` `(n, d)` and `y` `(n,)` in blocks of the same rows; raises `UsageError`."""
    import dask.array

    if y is None:
        raise UsageError("fit takes a cache, or rows X (n, d) with labels y (n,); y is missing")
    y = dask.array.asarray(y)
    if X.ndim != 2 or y.ndim != 1 or len(X) != len(y):
        raise UsageError(f"X must be (n, d) and y (n,); found {X.shape} and {y.shape}")
    return X.rechunk({1: -1}), y.rechunk((X.chunks[0],))


def distinct_labels(y: Any) -> np.ndarray:
    """The distinct labels of a numpy or dask array, ascending; dask is read block by block."""
    if isinstance(y, np.ndarray):
        return np.unique(y)
    import dask

    blocks = map(dask.delayed(np.unique), y.to_delayed())  # pyright: ignore
    return np.unique(np.concatenate(dask.compute(*blocks)))  # pyright: ignore


def check_labels(classes: np.ndarray) -> np.ndarray:
    """Raise `UsageError` unless the distinct labels `classes` can be saved as JSON."""
    if classes.dtype.kind == "f" and not np.isfinite(classes).all():
        raise UsageError("labels y must be finite; leave out the rows without a label")
    is_plain = all(isinstance(label, str | int | float | bool) for label in classes.tolist())
    if classes.dtype.kind not in f"{LABELS}O" or not is_plain:
        raise InputTypeError(
            f"labels y must be numbers or strings, not {classes.dtype}; convert them, for example "
            "with y.astype(str)"
        )
    return classes


def warn_unvalidated(pairs: list[tuple[int, int]], instead: str) -> None:
    """Warn that the validation split has no (t, t+N) for these (layer, offset) `pairs`.

    `instead` says which parameters are taken without a validation loss.
    """
    layers, offsets = (format_ranges(sorted({pair[axis] for pair in pairs})) for axis in (0, 1))
    warnings.warn(
        f"the validation split has no pair to validate layers {layers} at offset {offsets} with: "
        f"they are fitted unvalidated; {instead}. Use longer or more sequences",
        ResiduaWarning,
        stacklevel=4,
    )
