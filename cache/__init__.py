"""The activation cache: extraction, the format on disk, and reading without the model."""

from typing import TYPE_CHECKING

from .lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .background import BackgroundThread as BackgroundThread
    from .background import iterate_in_background as iterate_in_background
    from .cluster import connected as connected
    from .cluster import results as results
    from .cluster import threads_of as threads_of
    from .devices import TileRows as TileRows
    from .devices import choose_device as choose_device
    from .devices import copy_to_device as copy_to_device
    from .devices import copy_to_host as copy_to_host
    from .devices import free_memory as free_memory
    from .devices import is_out_of_memory as is_out_of_memory
    from .devices import iterate_on_device as iterate_on_device
    from .devices import memory_budget as memory_budget
    from .devices import memory_errors as memory_errors
    from .devices import release_memory as release_memory
    from .devices import wide_dtype as wide_dtype
    from .errors import CorruptError as CorruptError
    from .errors import DataError as DataError
    from .errors import HeadMismatchError as HeadMismatchError
    from .errors import IncompleteError as IncompleteError
    from .errors import InputTypeError as InputTypeError
    from .errors import Interrupted as Interrupted
    from .errors import InUseError as InUseError
    from .errors import LeaseLostError as LeaseLostError
    from .errors import LimitError as LimitError
    from .errors import MismatchError as MismatchError
    from .errors import MissingLibraryError as MissingLibraryError
    from .errors import ModelError as ModelError
    from .errors import NoSpaceError as NoSpaceError
    from .errors import NotFoundError as NotFoundError
    from .errors import ResiduaError as ResiduaError
    from .errors import ResiduaWarning as ResiduaWarning
    from .errors import UsageError as UsageError
    from .number_ranges import as_tuple as as_tuple
    from .number_ranges import as_whole_number as as_whole_number
    from .number_ranges import format_ranges as format_ranges
    from .number_ranges import is_several as is_several
    from .number_ranges import parse_ranges as parse_ranges
    from .optional_libraries import is_installed as is_installed
    from .optional_libraries import missing_library as missing_library
    from .optional_libraries import name_extras as name_extras
    from .optional_libraries import require_extra as require_extra
    from .progress import Progress as Progress
    from .progress import StageProgress as StageProgress
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
