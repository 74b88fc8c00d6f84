"""`LongText`: the text of a long document, which stays on the disk and is read in slices.

`TextFile` and `RowTable` give a `LongText` for documents of more than `LONG_BYTES`, so that the
memory of a document does not grow with its length. Tokenization reads the slices in order.
"""

from collections.abc import Iterator
from typing import IO

import numpy as np

LONG_BYTES = 4 << 20
"""UTF-8 bytes from which on a document is not read whole."""
BLOCK_BYTES = 1 << 18
"""Bytes of one read."""


class LongText:
    """The characters of the bytes `start` to `stop` of a file in UTF-8, read on slicing.

    Halves of surrogate pairs, which JSON can hold, are encoded as `surrogatepass` does. The
    constructor reads the bytes once: eight bytes of memory per block say where characters lie.
    """

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, stop
        counts = [int(np.count_nonzero(_begin_characters(block))) for block in self._byte_blocks(0)]
        self._characters = np.cumsum([0, *counts])
        """Characters that begin before each block, `(blocks + 1,)` int64."""

    def __len__(self) -> int:
        return int(self._characters[-1])

    def __str__(self) -> str:
        return "".join(self.blocks())

    def __getitem__(self, key: slice) -> str:
        """Read the characters of a slice without a step."""
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"a long text is read without a step, not with {step}")
        # The block in which the character `start` begins, and the character's number inside it.
        block = int(np.searchsorted(self._characters, start, side="right")) - 1
        skipped, wanted = start - int(self._characters[block]), stop - start
        pieces: list[str] = []
        for text in self._text_blocks(block):
            if wanted <= 0:
                break
            piece = text[skipped : skipped + wanted]
            skipped = max(0, skipped - len(text))
            wanted -= len(piece)
            pieces.append(piece)
        return "".join(pieces)

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about `BLOCK_BYTES`."""
        return self._text_blocks(0)

    def encoded_blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the text in UTF-8, in blocks that may end inside a character."""
        return self._byte_blocks(0)

    def _text_blocks(self, first: int) -> Iterator[str]:
        """Yield the characters that begin in block `first`, `first` + 1, ..."""
        unfinished = b""
        for block in self._byte_blocks(first):
            begins = np.flatnonzero(_begin_characters(block))
            if not len(begins):
                unfinished += block if unfinished else b""
                continue
            # Bytes before the first begin are of the character before; the last character may go
            # on in the next block.
            begin = 0 if unfinished else int(begins[0])
            last = int(begins[-1])
            yield (unfinished + block[begin:last]).decode("utf-8", "surrogatepass")
            unfinished = block[last:]
        yield unfinished.decode("utf-8", "surrogatepass")

    def _byte_blocks(self, first: int) -> Iterator[bytes]:
        position = self._start + first * BLOCK_BYTES
        while position < self._stop:
            # Others may have read elsewhere in the file meanwhile.
            self._file.seek(position)
            block = self._file.read(min(BLOCK_BYTES, self._stop - position))
            if not block:
                raise EOFError(f"the copy of the texts ends at byte {position}")
            yield block
            position += len(block)


def _begin_characters(block: bytes) -> np.ndarray:
    """Which bytes of `block` begin a character of UTF-8, `(bytes,)` bool."""
    return (np.frombuffer(block, np.uint8) & 0xC0) != 0x80
