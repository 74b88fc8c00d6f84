"""Whether two caches hold the same rows: digests, and comparisons of a cache with its extension.

`kept_moments.py` and `obtain_moments.py` use old moments only where these functions agree.
"""

import hashlib
from typing import Any

import numpy as np

from ...cache.files.json_files import json_digest
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import BLOCK_POSITIONS, segment_indices


def same_sequences(old: ActivationCache, new: ActivationCache, split: str, folds: int) -> bool:
    """Whether `new` begins with the sequences of `old`, in the same splits and folds."""
    count = len(old.sequence_length)
    new_split = new.sequences(split)
    return (
        old.d_model == new.d_model
        and old.head.digest == new.head.digest
        and np.array_equal(old.sequence_start, new.sequence_start[:count])
        and np.array_equal(old.sequence_length, new.sequence_length[:count])
        and np.array_equal(old.sequence_hash, new.sequence_hash[:count])
        # Splits of tiny sets may change, and a repair may quarantine a sequence.
        and np.array_equal(old.sequences(split), new_split[new_split < count])
        # Folds are cut by sequence if documents are few, by document if they are many.
        and np.array_equal(
            old.sequence_folds(folds, split), new.sequence_folds(folds, split)[:count]
        )
    )


def same_documents(old: ActivationCache, new: ActivationCache, across_documents: bool) -> bool:
    """Whether `new` begins with the documents of `old`, as far as pairs depend on them.

    Numbers of documents may differ, borders may not; both caches are read in blocks.
    """
    if across_documents or (old.document_numbers is None and new.document_numbers is None):
        return True
    numbers = np.arange(len(old.sequence_length))
    return all(
        np.array_equal(segment_indices(old, block)[0], segment_indices(new, block)[0])
        for block in old.blocks(numbers, BLOCK_POSITIONS)
    )


def same_rows(old: ActivationCache, new: ActivationCache, layer: int) -> bool:
    """Whether `new` begins with the stored rows of `old`.

    Parts that both caches have whole are compared by their checksums, all other rows byte by byte.
    A small cache has smaller parts than its extension: then every row is compared.
    """
    name, layout = f"residual/{layer}", old.manifest.layout
    old_rows, new_rows = old.residual_array(layer), new.residual_array(layer)
    if old_rows.layout.logical_dtype != new_rows.layout.logical_dtype:
        return False
    same_parts = layout == new.manifest.layout
    for part, record in old.committed.items():
        if same_parts and record.stop - record.start == layout.part_rows:
            a, b = (cache.committed[part].arrays[name] for cache in (old, new))
            if (a.bytes, a.crc32c) != (b.bytes, b.crc32c):
                return False
        else:
            for start in range(record.start, record.stop, rows := old.block_rows()):
                stop = min(start + rows, record.stop)
                a, b = (array.read_stored(start, stop) for array in (old_rows, new_rows))
                if a.tobytes() != b.tobytes():
                    return False
    return True


def sequences_digest(numbers: np.ndarray) -> dict[str, Any]:
    """`count` and `digest` (hex sha256 of little-endian int64) of sequence numbers."""
    data = np.ascontiguousarray(numbers, "<i8")
    return {"count": len(data), "digest": hashlib.sha256(data.data).hexdigest()}


def layer_digest(cache: ActivationCache, layer: int) -> str:
    """Digest of the dtype and of every shard (extent, bytes, checksum) of a layer."""
    dtype, shards = cache.array(f"residual/{layer}").layout.logical_dtype, []
    for part, record in sorted(cache.committed.items()):
        shard = record.arrays[f"residual/{layer}"]
        shards.append([part, record.start, record.stop, shard.bytes, shard.crc32c])
    return json_digest([dtype, *shards])
