"""The files of a root as a service gives them out: names, byte ranges, entity tags."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .byte_ranges import ByteRange as ByteRange
    from .byte_ranges import join_ranges as join_ranges
    from .byte_ranges import select_ranges as select_ranges
    from .served_objects import FolderEntry as FolderEntry
    from .served_objects import ServedFiles as ServedFiles
    from .served_objects import ServedObject as ServedObject
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
