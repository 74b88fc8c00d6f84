"""`KeptRows`: tensors of rows for all evaluations, in memory, in a scratch file, or made anew.

An evaluation needs the translated rows, M and log Z of each group (`CleanRows`) and, for a head by
formula, the products A `(n, vocab)`. `KeptRows` keeps the former in memory if they fit half of its
budget, and as many groups of A as fit the rest; what does not fit goes to a scratch file, or is
computed again in every evaluation.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import copy_to_device, copy_to_host
from ...cache.errors import NoSpaceError, UsageError
from ..training.threads import CPU

CLEAN = ("differences", "output", "expected", "log_z")
"""Names of the tensors of clean rows."""
TOKENS = ("tokens",)
"""Name of the products A."""


@dataclass(frozen=True)
class KeptPlaces:
    """Which tensors lie in memory, and where the others lie in a scratch file."""

    in_memory: frozenset[tuple[str, int]]
    """(name, group)."""
    offsets: dict[tuple[str, int], int]
    """(name, group) -> first byte in the scratch file."""
    rest_bytes: int
    """Size of the scratch file."""


def plan_places(
    groups: Sequence[slice],
    widths: Mapping[str, int],
    dtypes: Mapping[str, torch.dtype],
    memory: int,
) -> KeptPlaces:
    """Places of the tensors of `groups` of rows, with `widths` columns of `dtypes` by name.

    Clean rows lie in memory if all fit half of it; A of as many groups as fit the rest.
    """
    row_bytes = {name: widths[name] * dtypes[name].itemsize for name in widths}
    rows = sum(group.stop - group.start for group in groups)
    clean_fits = rows * sum(row_bytes[name] for name in CLEAN) <= memory // 2
    in_memory: set[tuple[str, int]] = set()
    offsets: dict[tuple[str, int], int] = {}
    rest_bytes = 0
    for names, may_fit in ((CLEAN, clean_fits), (TOKENS, True)):
        for number, group in enumerate(groups):
            sizes = {name: (group.stop - group.start) * row_bytes[name] for name in names}
            if may_fit and sum(sizes.values()) <= memory:
                in_memory |= {(name, number) for name in names}
                memory -= sum(sizes.values())
                continue
            for name, size in sizes.items():
                offsets[name, number] = rest_bytes
                rest_bytes += size
    return KeptPlaces(frozenset(in_memory), offsets, rest_bytes)


class KeptRows:
    """Tensors by name and group of rows, kept where `plan_places` says.

    Without a folder `scratch`, those that do not fit `memory` are made anew every time. The memory
    is that of `device`, where the tensors are.
    """

    def __init__(
        self,
        groups: Sequence[slice],
        widths: Mapping[str, int],
        dtypes: Mapping[str, torch.dtype],
        memory: int,
        scratch: Path | None = None,
        *,
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._widths, self._dtypes = widths, dtypes
        self._memory: dict[tuple[str, int, int], Tensor] = {}
        self._in_file: set[tuple[str, int, int]] = set()
        self._places = plan_places(groups, widths, dtypes, memory)
        size = self._places.rest_bytes
        self._file = -1 if scratch is None or not size else _open_scratch(scratch, size)

    def get(
        self,
        names: tuple[str, ...],
        number: int,
        rows: slice,
        make: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """The tensors `names` of `rows` of group `number`; those of `make` the first time.

        `rows` count from the beginning of the group. Two threads may not ask for one group at a
        time.
        """
        keys = [(name, number, rows.start) for name in names]
        if all(key in self._memory for key in keys):
            return tuple(self._memory[key] for key in keys)
        if all(key in self._in_file for key in keys):
            return tuple(self._read(name, number, rows) for name in names)
        tensors = make()
        self.put(names, number, rows, tensors)
        return tensors

    def put(
        self, names: tuple[str, ...], number: int, rows: slice, tensors: tuple[Tensor, ...]
    ) -> None:
        """Keep the tensors `names` of `rows` of group `number`, if they have a place."""
        for name, tensor in zip(names, tensors, strict=True):
            key = name, number, rows.start
            if key[:2] in self._places.in_memory:
                self._memory[key] = tensor
            elif self._file >= 0:
                self._write(key[0], number, rows, tensor)
                self._in_file.add(key)

    def forget(self) -> None:
        """Free the memory: all tensors are made anew."""
        self._memory.clear()
        self._in_file.clear()

    def close(self) -> None:
        """Free the memory, and the scratch file, which has no name any more."""
        self.forget()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _row_bytes(self, name: str) -> int:
        return self._widths[name] * self._dtypes[name].itemsize

    def _write(self, name: str, number: int, rows: slice, tensor: Tensor) -> None:
        data = memoryview(copy_to_host(tensor.contiguous()).numpy().reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
        offset = self._places.offsets[name, number] + rows.start * self._row_bytes(name)
        while data:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count

    def _read(self, name: str, number: int, rows: slice) -> Tensor:
        shape = (rows.stop - rows.start, self._widths[name])
        tensor = torch.empty(shape, dtype=self._dtypes[name])
        data = memoryview(tensor.numpy().reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
        offset = self._places.offsets[name, number] + rows.start * self._row_bytes(name)
        while data:
            count = os.preadv(self._file, [data], offset)
            if not count:
                raise OSError(errno.EIO, "the scratch file ends early")
            data, offset = data[count:], offset + count
        return copy_to_device(tensor, self._device)


def _open_scratch(folder: Path, size: int) -> int:
    """Descriptor of a new file of `size` bytes in `folder`, without a name: nothing is left behind.

    Raises `NoSpaceError` if the bytes are not free, `UsageError` for a path that is no folder.
    """
    if not folder.is_dir():
        raise UsageError(f"scratch must be an existing folder, not {folder}")
    free = shutil.disk_usage(folder).free
    message = (
        f"the scratch file needs {size:,} bytes, {folder} has {free:,} free: name another folder, "
        "take fewer positions, or leave scratch out (products are then computed again each time)"
    )
    if size > free:
        raise NoSpaceError(message)
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = os.dup(file.fileno())
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # File systems without reservation: writing finds out whether the bytes are free.
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return descriptor
        os.close(descriptor)
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(message) from None
        raise
    return descriptor
