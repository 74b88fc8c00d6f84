"""The format on disk: layout, shards, journal, manifest; plain zarr v3."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .array import CacheArray as CacheArray
    from .array_writer import create_logits as create_logits
    from .array_writer import create_part_array as create_part_array
    from .array_writer import create_residual as create_residual
    from .array_writer import create_table as create_table
    from .array_writer import write_table as write_table
    from .compressed_shard import shard_writer_for as shard_writer_for
    from .compression import check_codec as check_codec
    from .compression import compress_chunk as compress_chunk
    from .dtypes import LARGEST as LARGEST
    from .dtypes import STORED_DTYPES as STORED_DTYPES
    from .dtypes import ValueRange as ValueRange
    from .dtypes import choose_dtype as choose_dtype
    from .dtypes import decode_rows as decode_rows
    from .dtypes import decode_rows_into as decode_rows_into
    from .dtypes import encode_rows as encode_rows
    from .journal import BaseRecord as BaseRecord
    from .journal import Journal as Journal
    from .journal import PartRecord as PartRecord
    from .journal import ShardRecord as ShardRecord
    from .journal import merge_records as merge_records
    from .layout import CHECKSUM_BYTES as CHECKSUM_BYTES
    from .layout import TABLE_CHUNK_ROWS as TABLE_CHUNK_ROWS
    from .layout import TABLE_CHUNKS_PER_SHARD as TABLE_CHUNKS_PER_SHARD
    from .layout import ArrayKey as ArrayKey
    from .layout import Layout as Layout
    from .layout import array_key as array_key
    from .layout import array_name as array_name
    from .logits_arrays import DEFAULT_TOP as DEFAULT_TOP
    from .logits_arrays import FULL as FULL
    from .logits_arrays import FULL_ARRAY as FULL_ARRAY
    from .logits_arrays import NARROW_VOCAB as NARROW_VOCAB
    from .logits_arrays import RECOMPUTE as RECOMPUTE
    from .logits_arrays import TOP_ARRAYS as TOP_ARRAYS
    from .logits_arrays import LogitsArray as LogitsArray
    from .logits_arrays import TopK as TopK
    from .logits_arrays import check_kept_tokens as check_kept_tokens
    from .logits_arrays import check_logits_mode as check_logits_mode
    from .logits_arrays import list_logits_arrays as list_logits_arrays
    from .logits_arrays import logits_mode_covers as logits_mode_covers
    from .logits_arrays import pack_top as pack_top
    from .logits_arrays import top_logits as top_logits
    from .logits_arrays import top_size as top_size
    from .logits_arrays import unpack_top as unpack_top
    from .manifest import ALONE as ALONE
    from .manifest import BATCH as BATCH
    from .manifest import CODEC as CODEC
    from .manifest import DOCUMENT as DOCUMENT
    from .manifest import FORMAT as FORMAT
    from .manifest import FORMATS as FORMATS
    from .manifest import SEQUENCE as SEQUENCE
    from .manifest import SHORT_ID as SHORT_ID
    from .manifest import CaptureIdentity as CaptureIdentity
    from .manifest import Manifest as Manifest
    from .manifest import ModelIdentity as ModelIdentity
    from .manifest import TokenIdentity as TokenIdentity
    from .manifest import identity_of as identity_of
    from .shard import ShardWriter as ShardWriter
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
