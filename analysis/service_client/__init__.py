"""The client of a service: `connect` in Python, and the commands that run with --server."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .remote_service import RemoteService as RemoteService
    from .remote_service import connect as connect
    from .server_connection import ServerConnection as ServerConnection
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
