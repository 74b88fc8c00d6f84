"""The token stream that the model reads: sequences, documents, splits, kept positions."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .document_marks import BOS_POLICIES as BOS_POLICIES
    from .index_arrays import CONTEXT_DTYPES as CONTEXT_DTYPES
    from .index_arrays import SPAN_DTYPES as SPAN_DTYPES
    from .index_arrays import TABLE_DTYPES as TABLE_DTYPES
    from .index_arrays import compute_index_arrays as compute_index_arrays
    from .positions import check_positions as check_positions
    from .positions import keep_positions as keep_positions
    from .segments import BLOCK_POSITIONS as BLOCK_POSITIONS
    from .segments import PairScope as PairScope
    from .segments import context_blocks as context_blocks
    from .segments import context_indices as context_indices
    from .segments import context_numbers as context_numbers
    from .segments import crossing_shares as crossing_shares
    from .segments import document_of as document_of
    from .segments import dropped_rows as dropped_rows
    from .segments import has_document_borders as has_document_borders
    from .segments import is_sparse as is_sparse
    from .segments import neighbour_tokens as neighbour_tokens
    from .segments import segment_indices as segment_indices
    from .segments import sequence_of as sequence_of
    from .splits import SPLITS as SPLITS
    from .splits import assign_folds as assign_folds
    from .token_stream import TokenStream as TokenStream
    from .token_stream import concatenate as concatenate
    from .tokenization import tokenize as tokenize
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
