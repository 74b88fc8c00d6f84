"""Bytes, blocks of text and lines of a file that may be compressed; the memory stays flat."""

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


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file, from its beginning.

    Raises `DataError` where the file cannot be opened, is cut short or is not what its ending
    says.
    """
    compression = path.suffix.lower()
    try:
        with _opener(compression)(path) as file:
            yield file
    except (EOFError, zlib.error) as error:
        raise _damaged(path, compression, error) from None
    except OSError as error:
        if error.errno is not None:  # the system's own: no such file, no permission, full disk
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
    """The function that opens a file of the ending `compression` for reading bytes."""
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
    """The text of a file in blocks, without a byte order mark; `DataError` if it is not UTF-8.

    `translate` turns every end of a line (CR, LF, CRLF) into LF.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    ends = io.IncrementalNewlineDecoder(None, translate=True) if translate else None
    read = 0
    with open_bytes(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            held = len(utf8.getstate()[0])
            try:
                text = utf8.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = read - held + error.start
                raise DataError(
                    f"{path} is not UTF-8 text (byte {place}); convert it first"
                ) from None
            yield text if ends is None else ends.decode(text, final=not block)
            if not block:
                return
            read += len(block)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, which are left as they are.

    Lines end at LF; at CR in a file whose first block has a CR and no LF.
    """
    blocks = text_blocks(path, translate=False)
    first = next(blocks)
    while first.endswith("\r") and "\n" not in first and (block := next(blocks, None)):
        first += block  # its LF may be the next character
    end = "\r" if "\r" in first and "\n" not in first else "\n"
    pieces = [first]  # of a line that has not ended yet, but for the last one
    while True:
        *lines, rest = pieces.pop().split(end)
        if lines:
            yield "".join(pieces) + lines[0] + end
            yield from (line + end for line in lines[1:])
            pieces.clear()
        pieces.append(rest)
        block = next(blocks, None)
        if block is None:
            break
        pieces.append(block)
    if line := "".join(pieces):
        yield line
