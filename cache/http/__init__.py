"""Caches and probes of a residua service, read over HTTP."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .byte_client import ByteClient as ByteClient
    from .byte_client import shared_client as shared_client
    from .served_path import ServedPath as ServedPath
    from .served_path import is_served as is_served
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
