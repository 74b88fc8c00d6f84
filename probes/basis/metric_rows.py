"""Rows of `CausalBasis.metrics`: the KL of spans of k = 1, 2, 4, .. directions, by size."""

from collections.abc import Mapping
from typing import Any

MeanKL = dict[str, float | None]
"""`kl`, the mean in nats, and the ends `low` and `high` of its 95 % interval."""


def span_sizes(k: int) -> list[int]:
    """1, 2, 4, ... and `k`: the sizes of the spans that are measured."""
    return sorted({*(1 << i for i in range(k.bit_length())), k})


def with_number_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics read from JSON, with sizes of spans as numbers again."""
    return {
        name: {int(size): measures for size, measures in value.items()}
        if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value)
        else value
        for name, value in row.items()
    }
