"""Disk use of a root: what lies there, what names it, what may go, and pins."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .collection import CATEGORIES as CATEGORIES
    from .collection import Collection as Collection
    from .collection import collect as collect
    from .collection import plan_collection as plan_collection
    from .disk_report import DiskItem as DiskItem
    from .disk_report import DiskReport as DiskReport
    from .disk_report import measure_disk as measure_disk
    from .pins import Pin as Pin
    from .pins import list_pins as list_pins
    from .pins import pin_saved as pin_saved
    from .pins import unpin_saved as unpin_saved
    from .users import User as User
    from .users import users_of as users_of
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
