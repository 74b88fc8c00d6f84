"""Compares evaluations: equal but for what the order of additions changes in float32."""

from typing import Any

import pytest

from residua.analysis.evaluation.result import Evaluation

ROUNDING = 1e-5
"""Relative difference of float32 sums that other kernels or alignments add in another order."""


def assert_same_rows(found: Evaluation | dict[str, Any], want: Evaluation | dict[str, Any]) -> None:
    """The same rows, names and counts; measures equal to `ROUNDING`."""
    one, other = (e.to_dicts() if isinstance(e, Evaluation) else e for e in (found, want))
    assert_close(one, other, "evaluation")


def assert_close(one: Any, other: Any, where: str) -> None:
    """JSON values that are equal, floats to `ROUNDING` of themselves (or of 1 near zero)."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}[{number}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=ROUNDING, abs=ROUNDING, nan_ok=True), where
    else:
        assert one == other, where
