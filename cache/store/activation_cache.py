"""`ActivationCache`: reads the residual streams, tokens and head of a cache, lazily from disk.

Open a cache with `ActivationCache(path)`, or by name with `find_cache` (`catalog.py`); extraction
writes caches. Reading imports no torch and no transformers, and needs neither model nor texts.
`cache/README.md` describes the format on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CorruptError, IncompleteError, NotFoundError, UsageError
from ..files.confined_files import check_folders, is_regular, read_confined
from ..files.json_fields import MAX_JSON_BYTES
from ..files.paths import as_path, is_remote, total_bytes
from ..format.array import CacheArray
from ..format.journal import Journal, PartRecord
from ..format.logits_arrays import (
    DEFAULT_TOP,
    FULL_ARRAY,
    TOP_ARRAYS,
    TopK,
    list_logits_arrays,
    pack_top,
    top_size,
    unpack_top,
)
from ..format.manifest import SHORT_ID, Manifest
from ..function_above import call_above
from ..number_ranges import format_ranges
from ..tokens.splits import SPLITS
from ..tokens.table_checks import (
    check_contexts,
    check_extents,
    check_numbers,
    words_of_codes,
)
from .checked_arrays import LABELS, ArrayMetadata, CheckedArray, array_of_metadata, named_layers

if TYPE_CHECKING:
    import dask.array

    from ..head.head import Head


SLAB_ROWS = 128
"""Rows per slab: slabs of 64 to 256 rows, shuffled in a buffer, are as good as random order."""
WHOLE_ARRAYS = ("tokens/", "sequences/", "context/", "contexts/")
"""Prefixes of arrays that are written whole when the cache is created, not part by part."""
FOLDERS = ("arrays.zarr", "head", "journal", "leases", "moments")
"""Folders of a cache; a link in place of one is refused."""
BLOCK_BYTES = 16 << 20
"""Largest float32 block of one read; larger blocks cost twice the time per byte."""


@dataclass(frozen=True)
class Contexts:
    """Whole sequences as the model read them; `ids` is `(tokens,)`, all others `(contexts,)`."""

    ids: CacheArray
    """Token ids of all contexts, `(tokens,)`, read on slicing."""
    start: np.ndarray
    """Index in `ids` of the first token of each context."""
    length: np.ndarray
    """Tokens of each context."""
    row: np.ndarray
    """First position of the cache that comes from each context."""
    rows: np.ndarray
    """Positions of the cache that come from each context."""


class ActivationCache:
    """Residual streams of one model on one token stream, read lazily from disk.

    Arrays are position-major: layer `l` is `(positions, d_model)`. Layer 0 is the embedding
    output, layer `l` the output of block `l`, layer `L = n_blocks` the input of the final norm.
    Positions are those of all sequences, one sequence after the other.

        cache = ActivationCache("~/.cache/residua/3f9c1b...")
        cache.residual(6)  # lazy dask array (positions, d_model)
        cache.residual_array(6)[:1000]  # numpy float32, read on slicing
        cache.logits()  # lazy (positions, vocab): the model's logits
        train = cache.sequences("train")  # numbers of the sequences of a split
        cache.tokens.take(cache.positions_of(train))  # token ids of these sequences

    Raises `NotFoundError` if `path` has no cache and `CorruptError` if the cache is damaged;
    reading rows raises `IncompleteError` while the extraction is not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = as_path(path)
        if not is_regular(self.path, "manifest.json"):
            raise NotFoundError(f"{self.path} is not a cache: it has no manifest.json")
        check_folders(self.path, FOLDERS)
        self.manifest: Manifest = Manifest.read(self.path / "manifest.json")
        self.journal: Journal = Journal(self.path / "journal", self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the path is pickled: a worker opens the cache again.
        return type(self), (self.path.absolute(),)

    def __repr__(self) -> str:
        return (
            f"<ActivationCache {self.id[:SHORT_ID]} of {self.manifest.model_name!r}: "
            f"{self.positions} positions x {self.d_model}, layers {format_ranges(self.layers)}>"
        )

    def _repr_html_(self) -> str:
        """Model, data, shape, splits and size, for notebooks."""
        return call_above("analysis.display.object_html", "cache_html", self)

    # Identity and shape

    @property
    def id(self) -> str:
        """sha256 of the manifest's identity: model, tokens, capture; also the folder's name."""
        return self.manifest.id

    @property
    def positions(self) -> int:
        """Number of positions, over all sequences."""
        return self.manifest.tokens.positions

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.manifest.d_model

    @property
    def vocab(self) -> int:
        """Number of logits of the head."""
        return self.manifest.vocab

    @property
    def n_blocks(self) -> int:
        """Number L of blocks, which is also the number of the last layer."""
        return self.manifest.depth

    @cached_property
    def bytes(self) -> int:
        """Bytes of all files of the cache."""
        return total_bytes(self.path)

    # Layers

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that can be read at all positions, ascending."""
        names = [name for name in self.complete_names if name.startswith("residual/")]
        return tuple(sorted(int(name.split("/")[1]) for name in names))

    def residual_array(self, layer: int) -> CacheArray:
        """Layer `layer`, `(positions, d_model)` float32, read from disk on slicing.

        Raises `NotFoundError` for a layer that the cache lacks.
        """
        array = self._residual_arrays.get(layer)
        if array is None:
            # A complete layer needs no journal: every row is committed.
            name = f"residual/{self._check_layer(layer)}"
            records = (record.arrays.get(name) for record in self.committed.values())
            is_finite = all(record is not None and not record.nonfinite for record in records)
            array = CheckedArray(self.array_metadata, name, is_finite=is_finite)
            self._residual_arrays[layer] = array
        return array

    def residual(self, layer: int, dtype: Any = np.float32) -> "dask.array.Array":
        """Layer `layer` as a lazy dask array, `(positions, d_model)` of `dtype`."""
        return self._lazy(self.residual_array(layer), self.block_rows()).astype(dtype, copy=False)

    def array(self, name: str) -> CacheArray:
        """The stored array `name` inside `arrays.zarr`, such as `tokens/ids`.

        Reading rows of an array that is written part by part raises `IncompleteError` for rows that
        are not committed.
        """
        journal = None if name.startswith(WHOLE_ARRAYS) else self.journal
        return CheckedArray(self.array_metadata, name, journal)

    def has(self, name: str) -> bool:
        """Whether the cache has the array `name`: its base records name it."""
        return self.array_metadata.digest_of(name) is not None

    @cached_property
    def array_metadata(self) -> ArrayMetadata:
        """What manifest and base records say of the metadata of all arrays."""
        return ArrayMetadata(self.path, self.manifest, self.journal)

    # Tokens and sequences

    @cached_property
    def tokens(self) -> CacheArray:
        """Token ids, `(positions,)` int32, read on slicing."""
        return self.array("tokens/ids")

    @cached_property
    def token_index(self) -> CacheArray:
        """Index of each position in its context, `(positions,)` int32, read on slicing."""
        return self.array("tokens/index")

    @cached_property
    def sequence_start(self) -> np.ndarray:
        """First position of each sequence, `(sequences,)` int64."""
        return self._sequence_extents[0]

    @cached_property
    def sequence_length(self) -> np.ndarray:
        """Tokens of each sequence, `(sequences,)` int64."""
        return self._sequence_extents[1]

    @cached_property
    def _sequence_extents(self) -> tuple[np.ndarray, np.ndarray]:
        """First position and number of positions of each sequence, checked against each other."""
        start = self.array("sequences/start")[:]
        length = self.array("sequences/length")[:].astype(np.int64)
        check_extents(start, length, self.positions, f"{self.path}: sequences")
        return start, length

    def positions_of(self, sequences: np.ndarray) -> np.ndarray:
        """Positions of the sequences `sequences`, one sequence after the other, `(n,)` int64."""
        starts, lengths = self.sequence_start[sequences], self.sequence_length[sequences]
        ends = np.cumsum(lengths)
        # Row i of a sequence has the position i + start of the sequence - rows before the sequence.
        rows = np.arange(ends[-1] if len(ends) else 0)
        return rows + np.repeat(starts - (ends - lengths), lengths)

    def blocks(self, sequences: np.ndarray, rows: int | None = None) -> Iterator[np.ndarray]:
        """Cut the array `sequences`, in its order, into groups of about `rows` positions.

        A group has at most `rows` positions (default: `block_rows()`), or one longer sequence.
        """
        limit = rows or self.block_rows()
        lengths = self.sequence_length[sequences]
        start, size = 0, 0
        for index, length in enumerate(lengths):
            if size and size + length > limit:
                yield sequences[start:index]
                start, size = index, 0
            size += int(length)
        if size:
            yield sequences[start:]

    @cached_property
    def sequence_hash(self) -> np.ndarray:
        """First 64 bits of the sha256 of each sequence, `(sequences,)` uint64; cache/README.md."""
        return self.array("sequences/hash")[:]

    def tokenizer(self) -> Any:
        """The model's tokenizer (`tokenizers.Tokenizer`), from the file kept in the cache.

        Raises `UsageError` for a cache of images.
        """
        self.check_texts("its positions are patches, and it has no tokenizer")
        from tokenizers import Tokenizer

        raw = read_confined(self.path, "head/tokenizer.json", MAX_JSON_BYTES)
        try:
            return Tokenizer.from_str(raw.decode("utf-8"))
        except BaseException as error:
            # tokenizers raises bare Exception, and its panics are not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CorruptError(
                f"{self.path / 'head' / 'tokenizer.json'} is not a tokenizer: {error}"
            ) from None

    def following_tokens(self, positions: np.ndarray, across_documents: bool = False) -> np.ndarray:
        """Token that follows each of `positions` in its context, `(n,)` int64; -1 at the end.

        Contexts are whole also if only some of their positions are kept. The end of a document is
        an end too, unless `across_documents`.
        """
        from ..tokens.segments import neighbour_tokens

        return neighbour_tokens(self, positions, 1, across_documents)

    def check_texts(self, reason: str) -> None:
        """Raise `UsageError` with the `reason` if this is a cache of images."""
        if self.manifest.image_grid is not None:
            raise UsageError(
                f"cache {self.id[:SHORT_ID]} is of images: {reason}; `residua study vision` reads "
                "caches of images"
            )

    # Splits and folds

    def sequences(self, name: str) -> np.ndarray:
        """Numbers of the sequences of a split, ascending: `train`, `validation`, `test` or `all`.

        No split has quarantined sequences. Raises `UsageError` for an unknown split.
        """
        numbers = self._split_sequences(name)
        return numbers[~np.isin(numbers, list(self.quarantined))] if self.quarantined else numbers

    def _split_sequences(self, name: str) -> np.ndarray:
        """Like `sequences`, with quarantined sequences."""
        if name == "all":
            return np.arange(len(self.sequence_split))
        if name not in SPLITS:
            raise UsageError(f"there is no split {name!r}; splits are {', '.join(SPLITS)}, all")
        return np.flatnonzero(self.sequence_split == SPLITS.index(name))

    @cached_property
    def sequence_split(self) -> np.ndarray:
        """Split of each sequence as an index into `SPLITS`, `(sequences,)` uint8."""
        return self.array("sequences/split")[:]

    def sequence_folds(self, folds: int, split: str = "train") -> np.ndarray:
        """Fold of each sequence for cross-validation on `split`, `(sequences,)` int64.

        Sequences that begin in one document share a fold. If documents are so few that a fold would
        have no sequence of `split`, sequences are assigned to folds one by one.
        """
        from ..tokens.splits import assign_folds

        fold_of_sequence = assign_folds(self.sequence_document, folds)
        if len(np.unique(fold_of_sequence[self._split_sequences(split)])) < folds:
            return assign_folds(self.sequence_hash, folds)
        return fold_of_sequence

    @cached_property
    def quarantined(self) -> dict[int, str]:
        """Sequence -> reason, for sequences left out of all splits: non-finite activations."""
        records = self.committed.values()
        return {
            sequence: reason for record in records for sequence, reason in record.quarantine.items()
        }

    # Documents and contexts: the texts that sequences come from, and what the model read

    @cached_property
    def sequence_document(self) -> np.ndarray:
        """First 64 bits of the sha256 of the document in which each sequence begins.

        `(sequences,)` uint64. A cache of format 1 lacks this array and gives `sequence_hash`.
        """
        name = "sequences/document"
        return self.array(name)[:] if self.has(name) else self.sequence_hash

    @cached_property
    def document_numbers(self) -> CacheArray | None:
        """Number of the document of each position, `(positions,)` int64, read on slicing.

        None for caches made of token ids, which have no documents.
        """
        return self.array("tokens/row_id") if self.has("tokens/row_id") else None

    def spans(self, positions: np.ndarray) -> np.ndarray:
        """Document, first character and last + 1 character of each position, `(n, 3)` int64."""
        names = ("tokens/row_id", "tokens/char_start", "tokens/char_stop")
        return np.stack([self.array(name).take(positions) for name in names], -1)

    @cached_property
    def contexts(self) -> "Contexts":
        """The contexts: whole sequences as the model read them, and the rows that come from each.

        Sequences are parts of contexts if only some positions are kept.
        """
        if not self.has("context/ids"):
            start, length = self.sequence_start, self.sequence_length
            return Contexts(self.tokens, start, length, start, length)
        context_of_sequence = self.sequence_context
        start, length = self.array("contexts/start")[:], self.array("contexts/length")[:]
        ids = self.array("context/ids")
        check_extents(start, length, len(ids), f"{self.path}: contexts")
        check_contexts(context_of_sequence, len(start), f"{self.path}: sequences/context")
        rows = np.bincount(context_of_sequence, self.sequence_length, len(start)).astype(np.int64)
        return Contexts(ids, start, length.astype(np.int64), np.cumsum(rows) - rows, rows)

    @cached_property
    def sequence_context(self) -> np.ndarray:
        """Number of the context of each sequence, `(sequences,)`.

        If all positions are kept, contexts and sequences are the same.
        """
        if not self.has("context/ids"):
            return np.arange(len(self.sequence_length))
        return self.array("sequences/context")[:]

    @cached_property
    def image_keys(self) -> np.ndarray | None:
        """Hash of the image of each context, by which models find its pixels, `(contexts,)` int64.

        None for a cache of texts.
        """
        if self.manifest.image_grid is None:
            return None
        _, first = np.unique(self.sequence_context, return_index=True)
        return np.ascontiguousarray(self.sequence_document[first]).view(np.int64)

    @cached_property
    def context_document_numbers(self) -> CacheArray | None:
        """Like `document_numbers`, for each token of `contexts`, `(tokens,)` int64."""
        if not self.has("context/ids"):
            return self.document_numbers
        return self.array("context/row_id") if self.has("context/row_id") else None

    # Head and logits

    @cached_property
    def head(self) -> "Head":
        """Head of the model, layer L -> logits: final norm, unembedding, bias, scale, softcap."""
        from ..head.saved_head import load_head

        for name in ("head/head.json", "head/head.safetensors"):
            is_regular(self.path, name)  # raises for a link; `load_head` says what is missing
        return load_head(self.path / "head", self.d_model, self.vocab)

    def logits(self, layer: int | None = None) -> "dask.array.Array":
        """Logits of the head on `layer`, `(positions, vocab)` float32, as a lazy dask array.

        Without `layer`, these are the model's logits: read if the cache keeps all logits, else
        computed from layer L.
        """
        self.check_complete()
        rows = max(1, BLOCK_BYTES // (4 * self.vocab))
        if layer is None and FULL_ARRAY in self.complete_names:
            return self._lazy(self.array(FULL_ARRAY), rows)
        source = self.residual_array(self.n_blocks if layer is None else layer)
        head = self.head
        return self._lazy(source, rows).map_blocks(
            head.logits, dtype=np.float32, chunks=(dask_chunks(self.positions, rows), (self.vocab,))
        )

    def topk(self, size: int | None = None) -> TopK:
        """The `size` largest logits of every position, lazy (default: as many as stored, else 64).

        They are read if the cache keeps at least `size` of them, else computed from `logits()`.
        Equal logits may come in any order.
        """
        self.check_complete()
        stored_size = top_size(self.manifest.capture.logits)
        size = size or stored_size or min(DEFAULT_TOP, self.vocab)
        if not 1 <= size <= self.vocab:
            raise UsageError(f"size must lie in 1..{self.vocab}, got {size}")
        if size <= stored_size and self.complete_names.issuperset(TOP_ARRAYS):
            return self._stored_topk(size)
        # `pack_top` puts ids, values, logsumexp and tail into one array of 2 * size + 2 columns.
        logits = self.logits()
        chunks: Any = (logits.chunks[0], (2 * size + 2,))
        return unpack_top(logits.map_blocks(pack_top, size, dtype=np.float64, chunks=chunks), size)

    def _stored_topk(self, size: int) -> TopK:
        """The `size` largest of the stored logits; the probability of all others is `tail`."""
        rows = self.block_rows()
        ids, values, logsumexp, tail = (self._lazy(self.array(n), rows) for n in TOP_ARRAYS)
        if size < ids.shape[1]:
            dropped = np.exp(values[:, size:] - logsumexp[:, None]).sum(-1)
            ids, values, tail = ids[:, :size], values[:, :size], tail + dropped
        return TopK(ids.astype(np.int32), values, logsumexp, tail)

    @property
    def logits_names(self) -> tuple[str, ...]:
        """Names of the arrays of logits that the cache keeps; empty without logits."""
        arrays = list_logits_arrays(self.manifest.capture.logits, self.vocab, "float16")
        return tuple(array.name for array in arrays)

    # Labels of sequences

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels of sequences: columns of the data beside the text."""
        _, files = self.journal.base()
        names = [array_of_metadata(file) or "" for file in files]
        labels = [name.removeprefix(LABELS) for name in names if name.startswith(LABELS)]
        return tuple(sorted(label for label in labels if "/" not in label))

    def label(self, name: str, missing: str | None = "") -> np.ndarray:
        """Value of label `name` for each sequence, `(sequences,)`: numbers, or words as str.

        A missing word becomes `missing`, a missing number NaN. `missing=None` tells missing words
        from empty ones; the array then has dtype object.
        """
        if name not in self.label_names:
            names = ", ".join(self.label_names) or "none"
            raise NotFoundError(f"there is no label {name!r} in this cache; labels are: {names}")
        values = self.array(f"sequences/labels/{name}")[:]
        if not self.has_categories(f"sequences/labels/{name}"):
            return values
        words = [*self.categories(f"sequences/labels/{name}"), missing]
        check_numbers(values, len(words) - 1, f"{self.path}: sequences/labels/{name}", low=-1)
        # numpy's str dtype drops a NUL at the end of a word.
        fits_str = missing is not None and not any(word and word[-1] == "\0" for word in words)
        return np.array(words, None if fits_str else object)[values]

    def categories(self, name: str) -> tuple[str, ...]:
        """Word of each code of the array `name`; empty if the array's numbers are not codes."""
        return words_of_codes(self.array(name).attributes, f"{self.path}: {name}")

    def has_categories(self, name: str) -> bool:
        """Whether the numbers of the array `name` are codes of words."""
        return "categories" in self.array(name).attributes

    # Progress of the extraction

    @property
    def complete(self) -> bool:
        """Whether at least one layer can be read at all positions."""
        return bool(self.layers)

    @property
    def finished(self) -> bool:
        """Whether every array that the cache is meant to get is complete."""
        return self.complete and set(self.target_names) == self.complete_names

    def check_complete(self) -> None:
        """Raise `IncompleteError` unless at least one layer can be read at all positions."""
        if not self.complete:
            raise IncompleteError(
                f"cache {self.id[:SHORT_ID]} has {len(self.committed)} of {self.n_parts} parts; "
                "run the same `residua extract` again to finish it"
            )

    @property
    def n_parts(self) -> int:
        """Number of parts: the rows that are written and committed together."""
        return self.manifest.layout.parts(self.positions)

    @cached_property
    def committed(self) -> dict[int, PartRecord]:
        """Part -> its record, for committed parts; read once and kept."""
        return self.journal.parts()

    @cached_property
    def complete_names(self) -> set[str]:
        """Names of the arrays that every part has; empty while a part is missing."""
        records = self.committed
        if len(records) < self.n_parts:
            return set()
        return set.intersection(*(set(record.arrays) for record in records.values()))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the arrays that every part has or is meant to get."""
        return (*(f"residual/{layer}" for layer in self.target_layers), *self.logits_names)

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Layers that the cache has or is meant to get: the journal names their arrays."""
        _, files = self.journal.base()
        return named_layers(files, self.manifest.depth)

    # Sizes of reads

    def block_rows(self, rows: int = 1 << 16) -> int:
        """Rows of a block of at most `rows` rows and `BLOCK_BYTES` bytes of one float32 layer."""
        return max(1, min(rows, BLOCK_BYTES // (4 * self.d_model)))

    @property
    def slab_rows(self) -> int:
        """Rows that shuffled reading takes together: 128, or a whole chunk.

        A chunk of an object store is fetched, and a compressed chunk decompressed, as a whole:
        smaller reads would repeat that work.
        """
        reads_whole_chunks = is_remote(self.path) or self.manifest.codec != "raw"
        return self.manifest.layout.chunk_rows if reads_whole_chunks else SLAB_ROWS

    def _lazy(self, source: CacheArray, rows: int) -> "dask.array.Array":
        """`source` as a dask array in chunks of `rows` rows; its name identifies the data."""
        import dask.array

        name = f"{source.path.parent.name}-{source.path.name}-{self.id[:SHORT_ID]}-{rows}"
        chunks: Any = (rows, -1)[: source.ndim]
        return dask.array.from_array(source, chunks=chunks, name=name, asarray=False)

    @cached_property
    def _residual_arrays(self) -> dict[int, CacheArray]:
        """Layers that were opened."""
        return {}

    def _check_layer(self, layer: int) -> int:
        """`layer`; raises `NotFoundError` if the cache lacks it."""
        self.check_complete()
        if layer not in self.layers:
            raise NotFoundError(
                f"layer {layer} is not in this cache; it holds {format_ranges(self.layers)}"
            )
        return layer


def dask_chunks(positions: int, rows: int) -> tuple[int, ...]:
    """Sizes of dask's chunks along `positions` rows, cut into blocks of `rows`."""
    n_full, remainder = divmod(positions, rows)
    return (rows,) * n_full + ((remainder,) if remainder else ())
