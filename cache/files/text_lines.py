"""Reading of files as bytes, blocks of text or lines, uncompressed on the way.

The readers of texts (`documents/row_files.py`, `text_file.py`) use these functions. In memory are
at most a block of `BLOCK_BYTES` and one line.
"""

import codecs
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Endings of compressed files that are read."""
BLOCK_BYTES = 1 << 20
"""Bytes per read."""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, compressed or not, for reading its uncompressed bytes.

    Raises `DataError` if the file cannot be opened, is cut short, or does not have the compression
    of its ending.
    """
    compression = path.suffix.lower()
    try:
        with _opener(compression)(path) as file:
            yield file
    except (EOFError, zlib.error) as error:
        raise _damaged(path, compression, error) from None
    except OSError as error:
        if error.errno is not None:  # from the system: no such file, no permission, full disk
            if error.filename is not None and Path(error.filename) == path:
                raise DataError(f"{path} cannot be opened: {error.strerror}") from None
            raise
        if compression not in COMPRESSIONS:
            raise
        raise _damaged(path, compression, error) from None
    except Exception as error:
        if type(error).__name__ == "LZMAError":
            raise _damaged(path, compression, error) from None
        raise


def _opener(compression: str) -> Callable[[Path], Any]:
    """Function that opens a file with the ending `compression` for reading bytes."""
    if compression == ".gz":
        import gzip

        return gzip.open
    if compression == ".bz2":
        import bz2

        return bz2.open
    if compression == ".xz":
        import lzma

        return lzma.open
    if compression == ".zst":
        import pyarrow

        return lambda path: pyarrow.input_stream(str(path), compression="zstd")
    return lambda path: open(path, "rb")  # noqa: SIM115 (the caller's `with` closes it)


def _damaged(path: Path, compression: str, error: Exception) -> DataError:
    return DataError(
        f"{path} is cut short or is no {compression} file: {str(error).rstrip('.')}; "
        "copy or download it again"
    )


def text_blocks(path: Path, translate: bool = True) -> Iterator[str]:
    """Yield the text of a file in blocks, without a byte order mark.

    `translate` turns every line end (CR, LF, CRLF) into LF. Raises `DataError` if the file is not
    UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True) if translate else None
    bytes_read = 0
    with open_bytes(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = len(utf8.getstate()[0])  # bytes of a character cut by the block before
            try:
                text = utf8.decode(block, final=not block)
            except UnicodeDecodeError as error:
                location = bytes_read - pending + error.start
                raise DataError(
                    f"{path} is not UTF-8 text (byte {location}); convert it first"
                ) from None
            yield text if line_ends is None else line_ends.decode(text, final=not block)
            if not block:
                return
            bytes_read += len(block)


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file with their line ends, unchanged.

    Lines end at LF; at CR in a file whose first block has a CR and no LF.
    """
    # Decide by the first block which character ends lines.
    blocks = text_blocks(path, translate=False)
    first = next(blocks)
    while first.endswith("\r") and "\n" not in first and (block := next(blocks, None)):
        first += block  # LF may be the next character
    end = "\r" if "\r" in first and "\n" not in first else "\n"
    # Split blocks into lines; `pieces` are the parts of a line that has not ended yet, the last of
    # them not split so far.
    pieces = [first]
    while True:
        *lines, unfinished = pieces.pop().split(end)
        if lines:
            yield "".join(pieces) + lines[0] + end
            yield from (line + end for line in lines[1:])
            pieces.clear()
        pieces.append(unfinished)
        block = next(blocks, None)
        if block is None:
            break
        pieces.append(block)
    if line := "".join(pieces):
        yield line
