"""Comparison of evaluations up to float32 rounding: `assert_same_rows`."""

from typing import Any

import pytest

from residua.analysis.evaluation.result import Evaluation

ROUNDING = 1e-5
"""Relative difference between float32 sums in different orders of addition."""


def assert_same_rows(
    actual: Evaluation | dict[str, Any], expected: Evaluation | dict[str, Any]
) -> None:
    """Fail unless rows, names and counts are equal, and measures equal to `ROUNDING`."""
    assert_close(_as_json(actual), _as_json(expected), "evaluation")


def _as_json(evaluation: Evaluation | dict[str, Any]) -> Any:
    """The rows of an evaluation as JSON values."""
    return evaluation.to_dicts() if isinstance(evaluation, Evaluation) else evaluation


def assert_close(actual: Any, expected: Any, path: str) -> None:
    """Fail unless two JSON values are equal, floats to a relative or absolute `ROUNDING`.

    `path` names the values in the message.
    """
    assert type(actual) is type(expected), path
    if isinstance(actual, dict):
        assert set(actual) == set(expected), path
        for key in actual:
            assert_close(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(actual, list):
        assert len(actual) == len(expected), path
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, b, f"{path}[{number}]")
    elif isinstance(actual, float):
        assert actual == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING, nan_ok=True), path
    else:
        assert actual == expected, path
