"""Type narrowing for measures that may be undefined."""


def not_none(value: float | None) -> float:
    """`value`; fails the test if it is None."""
    assert value is not None
    return value
