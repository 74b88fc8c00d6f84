"""Rows and labels as users give them: taken as plain arrays, or refused with what to do."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import InputTypeError, ResiduaWarning, UsageError
from ...cache.number_ranges import format_ranges

if TYPE_CHECKING:
    pass


NUMBERS = "biuf"
"""Kinds of numpy dtypes that rows may have: bool, signed, unsigned, floating."""
LABELS = "biufU"
"""Kinds of numpy dtypes that labels may have: those of rows, and strings."""


def is_dask(values: Any) -> bool:
    """Whether `values` are a dask array, without importing dask for others."""
    return hasattr(values, "dask") and hasattr(values, "chunks")


def as_array(values: Any, name: str, known: bool = True, kinds: str = NUMBERS) -> Any:
    """`values` as fits read them: dask arrays stay lazy, tensors of torch become numpy.

    Raises `UsageError`, which says what to do, for masked arrays, other lazy objects than dask
    arrays, dtypes that are not of `kinds`, and, if the number of rows must be `known`, for chunks
    of unknown size. What numpy must still convert (lists, data frames) is left to scikit-learn.
    """
    if is_dask(values):
        return _checked_dask(values, name, known, kinds)
    if hasattr(values, "__dask_graph__"):
        raise InputTypeError(
            f"{name} is a {_type_name(values)}; give a dask array: "
            f"{name}.to_dask_array(lengths=True) of a dask frame, {name}.data of an xarray"
        )
    if type(values).__module__.partition(".")[0] == "torch":
        values = _of_torch(values)
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.is_masked(values):
            raise InputTypeError(f"{name} has masked values: {_unmask(name)}")
        values = np.ma.getdata(values)
    if isinstance(values, np.ndarray):
        values = _widened(values)
        # scikit-learn tries to read objects as numbers, and has its own message for complex ones.
        if values.dtype.kind not in f"{kinds}Oc":
            raise InputTypeError(_dtype_message(name, values.dtype, kinds))
    return values


def _checked_dask(values: Any, name: str, known: bool, kinds: str) -> Any:
    meta = values._meta
    if isinstance(meta, np.ma.MaskedArray):
        raise InputTypeError(f"{name} is a dask array of masked blocks: {_unmask(name)}")
    if not isinstance(meta, np.ndarray):
        raise InputTypeError(
            f"{name} is a dask array of {_type_name(meta)}; its blocks must be numpy arrays: "
            f"{name}.map_blocks(np.asarray)"
        )
    if values.dtype.kind == "V":
        values = values.map_blocks(_widened, dtype=np.float32)
    if values.dtype.kind not in kinds:
        raise InputTypeError(_dtype_message(name, values.dtype, kinds))
    if known and np.isnan(values.shape).any():
        raise UsageError(
            f"{name} has chunks of unknown size, shape {values.shape}: call "
            f"{name}.compute_chunk_sizes() first"
        )
    return values


def _of_torch(values: Any) -> np.ndarray:
    values = values.detach().cpu()
    # numpy has no bfloat16.
    return (
        values.float() if values.is_floating_point() and values.itemsize < 4 else values
    ).numpy()


def _widened(values: np.ndarray) -> np.ndarray:
    """Small floats of other packages, bfloat16 say, as float32."""
    is_float = values.dtype.kind == "V" and "float" in values.dtype.name
    return values.astype(np.float32) if is_float else values


def _unmask(name: str) -> str:
    return f"fill them, {name}.filled(value) (dask: da.ma.filled), or leave out their rows"


def _dtype_message(name: str, dtype: Any, kinds: str) -> str:
    takes = "numbers or strings" if kinds == LABELS else "numbers"
    if dtype.kind == "c":
        return f"Complex data not supported: {name} has dtype {dtype}; give real numbers"
    return f"{name} must hold {takes}, not {dtype}; convert it, for example with {name}.astype(...)"


def _type_name(value: Any) -> str:
    return f"{type(value).__module__.partition('.')[0]} {type(value).__name__}"


def validated(estimator: Any, *arrays: Any, **options: Any) -> Any:
    """scikit-learn's `validate_data`, whose errors become a `UsageError` with the same words."""
    from .estimator import validate_data

    try:
        return validate_data(estimator, *arrays, **options)
    except TypeError as error:
        raise InputTypeError(str(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_labels(classes: np.ndarray) -> np.ndarray:
    """Raise `UsageError` unless the sorted distinct labels `classes` can be kept with a probe."""
    if classes.dtype.kind == "f" and not np.isfinite(classes).all():
        raise UsageError("labels y must be finite; leave out the rows without a label")
    kept = all(isinstance(label, str | int | float | bool) for label in classes.tolist())
    if classes.dtype.kind not in f"{LABELS}O" or not kept:
        raise InputTypeError(
            f"labels y must be numbers or strings, not {classes.dtype}; convert them, for example "
            "with y.astype(str)"
        )
    return classes


def warn_unvalidated(pairs: list[tuple[int, int]], instead: str) -> None:
    """Warn that the (layer, offset) `pairs` have no pair of tokens in the validation split."""
    layers, offsets = (format_ranges(sorted({pair[part] for pair in pairs})) for part in (0, 1))
    warnings.warn(
        f"the validation split has no pair to validate layers {layers} at offset {offsets} with: "
        f"they are fitted unvalidated; {instead}. Use longer or more sequences",
        ResiduaWarning,
        stacklevel=4,
    )


def check_dask(X: Any, y: Any) -> tuple[Any, Any]:
    """`X` `(n, d)` and `y` `(n,)` in blocks of the same rows; raises `UsageError`."""
    import dask.array

    if y is None:
        raise UsageError("fit takes a cache, or rows X (n, d) with labels y (n,); y is missing")
    y = dask.array.asarray(y)
    if X.ndim != 2 or y.ndim != 1 or len(X) != len(y):
        raise UsageError(f"X must be (n, d) and y (n,); found {X.shape} and {y.shape}")
    return X.rechunk({1: -1}), y.rechunk((X.chunks[0],))


def check_distinct(y: Any) -> np.ndarray:
    """The sorted labels, of dask arrays block by block."""
    if isinstance(y, np.ndarray):
        return np.unique(y)
    import dask

    return np.unique(np.concatenate(dask.compute(*map(dask.delayed(np.unique), y.to_delayed()))))  # pyright: ignore
