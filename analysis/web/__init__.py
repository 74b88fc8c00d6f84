"""HTTP for the service: endpoints as a table, access, limits, records of requests."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .access_tokens import AccessTokens as AccessTokens
    from .endpoints import Endpoint as Endpoint
    from .endpoints import make_routes as make_routes
    from .open_api import describe_api as describe_api
    from .service_settings import ServiceSettings as ServiceSettings
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
