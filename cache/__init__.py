"""The activation cache: extraction, the format on disk, and reading without the model."""

from typing import TYPE_CHECKING

from .lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .background import BackgroundThread as BackgroundThread
    from .background import iterate_in_background as iterate_in_background
    from .cluster import connected as connected
    from .cluster import results as results
    from .cluster import threads_of as threads_of
    from .errors import CorruptError as CorruptError
    from .errors import DataError as DataError
    from .errors import HeadMismatchError as HeadMismatchError
    from .errors import IncompleteError as IncompleteError
    from .errors import InputTypeError as InputTypeError
    from .errors import Interrupted as Interrupted
    from .errors import LeaseLostError as LeaseLostError
    from .errors import LimitError as LimitError
    from .errors import MismatchError as MismatchError
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
    from .progress import Progress as Progress
    from .progress import StageProgress as StageProgress

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
