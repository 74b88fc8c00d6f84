"""Any probe, fitted on a cache in which one thing is changed."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .control_probe import as_control as as_control
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
