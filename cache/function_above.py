"""`call_above`: calls a function of a higher floor by its name, for methods that show a value.

Imports go down alone (docs/architecture.md), but a person asks the cache, the lens or the
evaluation itself for its picture. Such a method names the function that draws; it is imported when
the method is called, so that reading a cache loads no matplotlib. `tests/test_house.py` looks up
every name.
"""

from importlib import import_module
from typing import Any

PACKAGE = (__package__ or "").partition(".")[0]
"""Name of the whole package."""


def call_above(module: str, function: str, *args: Any, **options: Any) -> Any:
    """The result of `function` in the `module` of the package, such as `analysis.display.html`."""
    return getattr(import_module(f"{PACKAGE}.{module}"), function)(*args, **options)
