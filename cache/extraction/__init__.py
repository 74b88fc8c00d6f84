"""One request, from options to a complete cache; also repair, and the workers of a dask cluster."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .answer import answer_request as answer_request
    from .answer import estimate_request as estimate_request
    from .answer import request_tokenizer as request_tokenizer
    from .damage_repair import Repair as Repair
    from .damage_repair import repair as repair
    from .distributed import answer_at_address as answer_at_address
    from .model_reload import load_model_of as load_model_of
    from .request import ExtractionRequest as ExtractionRequest
    from .resolve import named_differences as named_differences
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
