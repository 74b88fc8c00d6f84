"""Texts for studies: questions, lists and patterns whose answers are known."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .continuations import write_continuations as write_continuations
    from .in_context_data import write_in_context_data as write_in_context_data
    from .injection_data import write_injection_data as write_injection_data
    from .key_value_data import write_key_value_data as write_key_value_data
    from .multi_document_data import write_multi_document_data as write_multi_document_data
    from .published_contexts import write_published_contexts as write_published_contexts
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
