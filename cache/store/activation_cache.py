"""Opens a cache for reading: no model, no torch, no transformers, no data set."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IncompleteError, NotFoundError, UsageError
from ..files.paths import as_path, is_remote, total_bytes
from ..format.array import CacheArray
from ..format.journal import Journal, PartRecord
from ..format.logits_arrays import (
    DEFAULT_TOP,
    FULL_ARRAY,
    TOP_ARRAYS,
    TopK,
    logits_arrays,
    pack_top,
    top_size,
    unpack_top,
)
from ..format.manifest import SHORT_ID, Manifest
from ..number_ranges import format_ranges
from ..tokens.splits import SPLITS

if TYPE_CHECKING:
    import dask.array

    from ..head.head import Head


SLAB_ROWS = 128
"""Slabs of 64 to 256 rows, shuffled in a buffer, are as good as true random order."""
WHOLE = ("tokens/", "sequences/", "context/", "contexts/")
"""Beginnings of the names of arrays that are there before the first part."""
BLOCK_BYTES = 16 << 20
"""Largest float32 block of one read; larger blocks cost twice the time per byte."""


@dataclass(frozen=True)
class Contexts:
    """Whole sequences as the model read them; all arrays `(contexts,)` but `ids`."""

    ids: CacheArray
    """Token ids of all contexts, `(tokens,)`, read on slicing."""
    start: np.ndarray
    """First token of each context."""
    length: np.ndarray
    """Tokens of each context."""
    row: np.ndarray
    """First position of the cache that comes from each context."""
    rows: np.ndarray
    """Positions that come from each context."""


class ActivationCache:
    """Residual streams of one model on one token stream, read lazily from disk.

    Arrays are position-major: layer `l` is `(positions, d_model)`. Layer 0 is the embedding
    output, layer `l` the output of block `l`, layer `L = depth` the last one before the final
    norm. Raises `NotFoundError` if there is no cache at `path`, `CorruptError` if it is damaged,
    `IncompleteError` if its extraction is not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path)
        if not (self.path / "manifest.json").is_file():
            raise NotFoundError(f"{self.path} is not a cache: it has no manifest.json")
        self.manifest = Manifest.read(self.path / "manifest.json")
        self.journal = Journal(self.path / "journal")

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the path travels: a worker opens the cache on its own.
        return type(self), (self.path.absolute(),)

    def __repr__(self) -> str:
        return (
            f"<ActivationCache {self.id[:SHORT_ID]} of {self.manifest.model_name!r}: "
            f"{self.positions} positions x {self.d_model}, layers {format_ranges(self.layers)}>"
        )

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def positions(self) -> int:
        return self.manifest.tokens.positions

    @property
    def d_model(self) -> int:
        return self.manifest.d_model

    @property
    def vocab(self) -> int:
        return self.manifest.vocab

    @property
    def n_blocks(self) -> int:
        """Number L of blocks, which is also the number of the last layer."""
        return self.manifest.depth

    @property
    def n_parts(self) -> int:
        return self.manifest.layout.parts(self.positions)

    @cached_property
    def committed(self) -> dict[int, PartRecord]:
        """Committed parts by number, as they were when first asked for."""
        return self.journal.parts()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that are complete over all positions."""
        names = self.complete_names
        return tuple(sorted(int(n.split("/")[1]) for n in names if n.startswith("residual/")))

    @cached_property
    def complete_names(self) -> set[str]:
        """Arrays that every part has."""
        found = self.committed
        if len(found) < self.n_parts:
            return set()
        return set.intersection(*(set(record.arrays) for record in found.values()))

    @property
    def complete(self) -> bool:
        """Whether at least one layer can be read over all positions."""
        return bool(self.layers)

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Layers that this cache has or is meant to get: those whose array the journal names."""
        _, files = self.journal.base()
        found = [re.fullmatch(r"arrays\.zarr/residual/(\d+)/zarr\.json", name) for name in files]
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def logits_names(self) -> tuple[str, ...]:
        """Arrays of the logits that the cache keeps beside the layers."""
        arrays = logits_arrays(self.manifest.capture.logits, self.vocab, "float16")
        return tuple(array.name for array in arrays)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Arrays that every part has or is meant to get."""
        return (*(f"residual/{layer}" for layer in self.target_layers), *self.logits_names)

    @property
    def finished(self) -> bool:
        """Whether every array that the cache is meant to have is complete."""
        return self.complete and set(self.target_names) == self.complete_names

    @cached_property
    def bytes(self) -> int:
        """Bytes of all files of this cache."""
        return total_bytes(self.path)

    def array(self, name: str) -> CacheArray:
        """A stored array by its name inside `arrays.zarr`, such as `tokens/ids`.

        Of arrays that are written part by part, rows that are not committed raise
        `IncompleteError` when they are read.
        """
        by_parts = not name.startswith(WHOLE)
        return CacheArray(self.path / "arrays.zarr" / name, self.journal if by_parts else None)

    def has(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return (self.path / "arrays.zarr" / name / "zarr.json").is_file()

    def categories(self, name: str) -> tuple[str, ...]:
        """The words that the codes of an array stand for; empty if its numbers are no codes."""
        return tuple(self.array(name).attributes.get("categories", ()))

    def has_categories(self, name: str) -> bool:
        """Whether the numbers of an array are codes of words."""
        return "categories" in self.array(name).attributes

    @property
    def label_names(self) -> tuple[str, ...]:
        """Labels that the sequences have: the other columns of the data they came from."""
        folder = self.path / "arrays.zarr" / "sequences" / "labels"
        return tuple(sorted(path.parent.name for path in folder.glob("*/zarr.json")))

    def label(self, name: str, missing: str | None = "") -> np.ndarray:
        """One value per sequence, `(sequences,)`; words as str, `missing` where one is missing.

        With None for `missing`, unlike with the empty word, those that are empty in the data can
        be told from it; the array then holds objects. Missing numbers are NaN.
        """
        if name not in self.label_names:
            known = ", ".join(self.label_names) or "none"
            raise NotFoundError(f"there is no label {name!r} in this cache; labels are: {known}")
        values = self.array(f"sequences/labels/{name}")[:]
        if not self.has_categories(f"sequences/labels/{name}"):
            return values
        words = [*self.categories(f"sequences/labels/{name}"), missing]
        # numpy's own texts lose a NUL at their end
        plain = missing is not None and not any(word and word[-1] == "\0" for word in words)
        return np.array(words, None if plain else object)[values]

    def spans(self, positions: np.ndarray) -> np.ndarray:
        """Document, first character and end of each position, `(n, 3)` int64."""
        names = ("tokens/row_id", "tokens/char_start", "tokens/char_stop")
        return np.stack([self.array(name).take(positions) for name in names], -1)

    def residual_array(self, layer: int) -> CacheArray:
        """Layer `layer` as an array that reads on slicing, `(positions, d_model)` float32."""
        return self._arrays[self._check(layer)]

    def residual(self, layer: int, dtype: Any = np.float32) -> "dask.array.Array":
        """Layer `layer` as a lazy dask array, `(positions, d_model)`."""
        return self._lazy(self.residual_array(layer), self.block_rows()).astype(dtype, copy=False)

    def logits(self, layer: int | None = None) -> "dask.array.Array":
        """Logits `(positions, vocab)` of the head on `layer` (default: L, the model), lazy.

        Where all logits are stored, those are read if no layer is named; else they are computed.
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
        """The `size` largest logits of every position (default: as stored, else 64), lazy.

        Read where at least as many are stored; else computed as `logits()` are. Among equal
        logits the order is any.
        """
        self.check_complete()
        stored = top_size(self.manifest.capture.logits)
        size = size or stored or min(DEFAULT_TOP, self.vocab)
        if not 1 <= size <= self.vocab:
            raise UsageError(f"size must lie in 1..{self.vocab}, got {size}")
        if size <= stored and self.complete_names.issuperset(TOP_ARRAYS):
            return self._stored_top(size)
        logits = self.logits()
        chunks: Any = (logits.chunks[0], (2 * size + 2,))
        return unpack_top(logits.map_blocks(pack_top, size, dtype=np.float64, chunks=chunks), size)

    def _stored_top(self, size: int) -> TopK:
        """The first `size` of the stored ones; what is not among them is in the tail."""
        rows = self.block_rows()
        ids, values, logsumexp, tail = (self._lazy(self.array(n), rows) for n in TOP_ARRAYS)
        if size < ids.shape[1]:
            left = np.exp(values[:, size:] - logsumexp[:, None]).sum(-1)
            ids, values, tail = ids[:, :size], values[:, :size], tail + left
        return TopK(ids.astype(np.int32), values, logsumexp, tail)

    def _lazy(self, source: CacheArray, rows: int) -> "dask.array.Array":
        import dask.array

        name = f"{source.path.parent.name}-{source.path.name}-{self.id[:SHORT_ID]}-{rows}"
        chunks: Any = (rows, -1)[: source.ndim]
        return dask.array.from_array(source, chunks=chunks, name=name, asarray=False)

    def block_rows(self, rows: int = 1 << 16) -> int:
        """Rows of a block of at most `rows` rows and `BLOCK_BYTES` bytes of float32."""
        return max(1, min(rows, BLOCK_BYTES // (4 * self.d_model)))

    @property
    def slab_rows(self) -> int:
        """Neighbouring rows that shuffled reads take at once: few, or a chunk where it comes whole.

        From afar, and where it is compressed.
        """
        whole = is_remote(self.path) or self.manifest.codec != "raw"
        return self.manifest.layout.chunk_rows if whole else SLAB_ROWS

    def blocks(self, sequences: np.ndarray, rows: int | None = None) -> Iterator[np.ndarray]:
        """Group whole `sequences` (numbers, in any order) so that a group has about `rows` rows."""
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

    def positions_of(self, sequences: np.ndarray) -> np.ndarray:
        """Positions of whole `sequences`, one sequence after the other."""
        starts, lengths = self.sequence_start[sequences], self.sequence_length[sequences]
        ends = np.cumsum(lengths)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)

    @cached_property
    def quarantined(self) -> dict[int, str]:
        """Sequence -> why it is in no split: its activations are not finite."""
        records = self.committed.values()
        return {number: why for record in records for number, why in record.quarantine.items()}

    def sequences(self, name: str) -> np.ndarray:
        """Numbers of the sequences of a split: `train`, `validation`, `test` or `all`.

        Quarantined sequences are in none of them.
        """
        numbers = self._split(name)
        return numbers[~np.isin(numbers, list(self.quarantined))] if self.quarantined else numbers

    def _split(self, name: str) -> np.ndarray:
        if name == "all":
            return np.arange(len(self.sequence_split))
        if name not in SPLITS:
            raise UsageError(f"there is no split {name!r}; splits are {', '.join(SPLITS)}, all")
        return np.flatnonzero(self.sequence_split == SPLITS.index(name))

    @cached_property
    def tokens(self) -> CacheArray:
        """Token ids, `(positions,)` int32, read on slicing."""
        return self.array("tokens/ids")

    @cached_property
    def sequence_start(self) -> np.ndarray:
        """First position of each sequence, `(sequences,)` int64."""
        return self.array("sequences/start")[:]

    @cached_property
    def sequence_length(self) -> np.ndarray:
        """Tokens of each sequence, `(sequences,)` int64."""
        return self.array("sequences/length")[:].astype(np.int64)

    @cached_property
    def sequence_split(self) -> np.ndarray:
        """Split of each sequence as an index into `SPLITS`, `(sequences,)` uint8."""
        return self.array("sequences/split")[:]

    @cached_property
    def sequence_hash(self) -> np.ndarray:
        """64 bits of the sha256 of each sequence, `(sequences,)` uint64; see cache/README.md."""
        return self.array("sequences/hash")[:]

    @cached_property
    def sequence_document(self) -> np.ndarray:
        """64 bits of the sha256 of the text in which each sequence begins, `(sequences,)` uint64.

        In format 1, which has no such number, `sequence_hash`.
        """
        name = "sequences/document"
        return self.array(name)[:] if self.has(name) else self.sequence_hash

    def sequence_folds(self, folds: int, split: str = "train") -> np.ndarray:
        """Fold of each sequence for cross-validation on `split`, `(sequences,)` int64.

        Sequences that begin in one document are in one fold. Where documents are so few that a
        fold would have none of the split, folds are of single sequences instead.
        """
        from ..tokens.splits import assign_folds

        found = assign_folds(self.sequence_document, folds)
        if len(np.unique(found[self._split(split)])) < folds:
            return assign_folds(self.sequence_hash, folds)
        return found

    @cached_property
    def document_numbers(self) -> CacheArray | None:
        """Number of the source document of each position, int64, read on slicing; None if unknown.

        In the tables `tokens/row_id`; unknown in caches made of token ids.
        """
        return self.array("tokens/row_id") if self.has("tokens/row_id") else None

    @cached_property
    def context_document_numbers(self) -> CacheArray | None:
        """The same for each token of `contexts`; None if unknown."""
        if not self.has("context/ids"):
            return self.document_numbers
        return self.array("context/row_id") if self.has("context/row_id") else None

    @cached_property
    def token_index(self) -> CacheArray:
        """Index of each position in the sequence that the model read, int32, read on slicing."""
        return self.array("tokens/index")

    @cached_property
    def sequence_context(self) -> np.ndarray:
        """Number of the context of each sequence, `(sequences,)`; itself where all are kept."""
        if not self.has("context/ids"):
            return np.arange(len(self.sequence_length))
        return self.array("sequences/context")[:]

    @cached_property
    def contexts(self) -> "Contexts":
        """The whole sequences that went through the model, and the rows that each gave."""
        if not self.has("context/ids"):
            start, length = self.sequence_start, self.sequence_length
            return Contexts(self.tokens, start, length, start, length)
        of_run = self.sequence_context
        start, length = self.array("contexts/start")[:], self.array("contexts/length")[:]
        rows = np.bincount(of_run, self.sequence_length, len(start)).astype(np.int64)
        return Contexts(
            self.array("context/ids"), start, length.astype(np.int64), np.cumsum(rows) - rows, rows
        )

    @cached_property
    def head(self) -> "Head":
        """Final norm, unembedding, bias, scale and softcap: residual of layer L -> logits."""
        from ..head.load_head import load_head

        return load_head(self.path / "head")

    def tokenizer(self) -> Any:
        """The model's tokenizer, from the files kept in the cache; imports `tokenizers` only."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str((self.path / "head" / "tokenizer.json").read_text("utf-8"))

    def following_tokens(self, positions: np.ndarray, across_documents: bool = False) -> np.ndarray:
        """Token that the text goes on with after each of `positions`, `(n,)` int64; -1 at its end.

        The text is that of the whole sequences that the model read, also where only some of their
        positions are kept; it ends with its document unless `across_documents`.
        """
        from ..tokens.segments import neighbour_tokens

        return neighbour_tokens(self, positions, 1, across_documents)

    def check_complete(self) -> None:
        """Raise `IncompleteError` if rows are missing."""
        if not self.complete:
            raise IncompleteError(
                f"cache {self.id[:SHORT_ID]} has {len(self.committed)} of {self.n_parts} parts; "
                "run the same `residua extract` again to finish it"
            )

    @cached_property
    def _arrays(self) -> dict[int, CacheArray]:
        residual = self.path / "arrays.zarr" / "residual"  # complete: nothing to look up
        return {layer: CacheArray(residual / str(layer)) for layer in self.layers}

    def _check(self, layer: int) -> int:
        self.check_complete()
        if layer not in self.layers:
            raise NotFoundError(
                f"layer {layer} is not in this cache; it holds {format_ranges(self.layers)}"
            )
        return layer


def dask_chunks(positions: int, rows: int) -> tuple[int, ...]:
    """Chunk sizes of `positions` rows in blocks of `rows`."""
    full, rest = divmod(positions, rows)
    return (rows,) * full + ((rest,) if rest else ())
