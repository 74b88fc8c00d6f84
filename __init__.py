"""Run a frozen language model once, keep its residual streams, fit every probe from the cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.store import ActivationCache as ActivationCache

__version__ = "0.1.0"

# Public name -> module; imported on first use, so that `import residua` stays light.
_PUBLIC = {
    "ActivationCache": ".cache.store",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'residua' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
