"""Rows of measures as a data frame of pandas, which is imported only here."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...cache.optional_libraries import require_library

if TYPE_CHECKING:
    import pandas as pd

INTEGERS = ("layer", "offset", "n", "n_undefined", "n_text")
"""Columns of whole numbers; a baseline has no layer."""


def rows_frame(rows: Iterable[Any]) -> "pd.DataFrame":
    """Rows (dataclasses) as a data frame; undefined measures are NaN, no layer is <NA>.

    Raises `MissingLibraryError` where pandas is not installed.
    """
    return data_frame([{**asdict(row), "probe": str(row.probe)} for row in rows])


def data_frame(records: list[dict[str, Any]]) -> "pd.DataFrame":
    """`records` as a data frame: whole numbers are nullable, None among measures is NaN.

    Raises `MissingLibraryError` where pandas is not installed.
    """
    require_library("pandas", "a data frame")
    import pandas as pd

    frame = pd.DataFrame.from_records(records)
    for name in frame.columns:
        if name in INTEGERS:
            frame[name] = frame[name].astype("Int64")
        elif frame[name].dtype == object and _is_number_column(records, str(name)):
            frame[name] = frame[name].astype("float64")
    return frame


def _is_number_column(records: list[dict[str, Any]], name: str) -> bool:
    """Whether all values of a column are numbers or None."""
    values = (record[name] for record in records)
    return all(value is None or isinstance(value, int | float) for value in values)
