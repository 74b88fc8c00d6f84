"""The dashboard: the page that the service shows in a browser, as files without a build step."""

from .static_files import StaticFile, read_static_files

__all__ = ["StaticFile", "read_static_files"]
