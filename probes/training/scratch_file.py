"""Memory in a temporary file: tensors that a fit needs in turns, more than its budget of memory.

The file is mapped: the kernel writes tensors out when memory is short and reads them back when
they are used. Tuned lenses keep their translators there (`lens/fit_groups.py`), `top_tokens.py` its
labels.
"""

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ...cache.files.disk_errors import translate_disk_errors


class ScratchFile:
    """A mapped temporary file of `size` bytes, from which `copy` cuts tensors.

    The file is removed at once and lives as long as its tensors. Raises `NoSpaceError` if the
    folder of temporary files has no space.
    """

    ALIGNMENT = 64
    """Tensors begin at multiples of so many bytes, as those of torch in memory."""

    def __init__(self, size: int) -> None:
        self._bytes = map_temporary_file(np.dtype(np.uint8), size)
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in the file; in memory if the file is full."""
        start, stop = self._used, self._used + tensor.nbytes
        if stop > len(self._bytes):
            return tensor.clone()
        self._used = -(-stop // self.ALIGNMENT) * self.ALIGNMENT
        place = torch.from_numpy(self._bytes[start:stop]).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


def map_temporary_file(dtype: np.dtype, length: int) -> np.ndarray:
    """`length` zeros in a mapped temporary file, without a name.

    Raises `NoSpaceError` if the folder of temporary files has no space.
    """
    folder = Path(tempfile.gettempdir())
    with translate_disk_errors(folder), tempfile.TemporaryFile(prefix="residua-") as file:
        # The bytes are reserved: a disk that is full when a page of the map is written would kill
        # the process (SIGBUS).
        _reserve(file, dtype.itemsize * length)
        return np.memmap(file, dtype, "r+", shape=(length,))


def _reserve(file: BinaryIO, size: int) -> None:
    """Give a new `file` its `size` bytes on the disk, zeros; raises `OSError` if they lack."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        # macOS, and file systems without reservation: the zeros are written.
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        file.write(bytes(size))
        file.flush()
