"""Documents and their labels, read from files, folders and the hub."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .data_files import STANDARD_INPUT as STANDARD_INPUT
    from .document_loading import load_documents as load_documents
    from .documents import Documents as Documents
    from .documents import Reading as Reading
    from .documents import reason_to_drop as reason_to_drop
    from .labels import ANSWER as ANSWER
    from .labels import ANSWER_START as ANSWER_START
    from .labels import EXPLICIT as EXPLICIT
    from .labels import LABEL_PREFIX as LABEL_PREFIX
    from .labels import join_labels as join_labels
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
