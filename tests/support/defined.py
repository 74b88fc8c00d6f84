"""Measures that may be undefined, where a test knows that they are not."""


def not_none(value: float | None) -> float:
    """`value`, which is not None."""
    assert value is not None
    return value
