"""A cache as a whole: opened, listed, created, extended, verified; without a model."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .activation_cache import BLOCK_BYTES as BLOCK_BYTES
    from .activation_cache import ActivationCache as ActivationCache
    from .cache_creation import CACHE_FOLDERS as CACHE_FOLDERS
    from .cache_creation import create_cache as create_cache
    from .cache_creation import publish_cache as publish_cache
    from .cache_creation import sweep_unfinished as sweep_unfinished
    from .cache_extension import add_layers as add_layers
    from .cache_extension import add_tokens as add_tokens
    from .cache_extension import join_stream as join_stream
    from .cache_extension import unnamed_layers as unnamed_layers
    from .catalog import cache_root as cache_root
    from .catalog import describe_cache as describe_cache
    from .catalog import find_cache as find_cache
    from .catalog import find_path as find_path
    from .catalog import list_caches as list_caches
    from .catalog import list_paths as list_paths
    from .checked_arrays import ArrayMetadata as ArrayMetadata
    from .checked_arrays import CheckedArray as CheckedArray
    from .lineage import cache_lineage as cache_lineage
    from .lineage import open_ancestor as open_ancestor
    from .local_origin import public_name as public_name
    from .local_origin import read_origin as read_origin
    from .local_origin import write_origin as write_origin
    from .part_writer import PartWriter as PartWriter
    from .row_runs import RowRuns as RowRuns
    from .sequence_draw import draw_sequences as draw_sequences
    from .slab_shuffle import BUFFER_ROWS as BUFFER_ROWS
    from .slab_shuffle import SLAB_ROWS as SLAB_ROWS
    from .slab_shuffle import Slabs as Slabs
    from .slab_shuffle import SlabShuffle as SlabShuffle
    from .verification import Damage as Damage
    from .verification import Verification as Verification
    from .verification import verify as verify
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
