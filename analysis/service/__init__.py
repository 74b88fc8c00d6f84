"""The HTTP service over the caches and probes of one root: its server and its routes."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .application import Service as Service
    from .application import make_application as make_application
    from .server import run_service as run_service
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
