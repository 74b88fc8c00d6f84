"""Limits of the process end a command with one message that names the limit and what to do."""

import errno
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import DataError, LimitError, ModelError, NoSpaceError, UsageError
from residua.cache.files.disk_errors import (
    system_error,
    translate_any_disk_errors,
    translate_disk_errors,
)
from residua.cache.format.compressed_shard import shard_writer_for
from residua.cache.format.layout import ArrayLayout

LIMITS = {
    "too many open files": OSError(errno.EMFILE, "as the system says", "file"),
    "on this machine": OSError(errno.ENFILE, "as the system says"),
    "too large": OSError(errno.EFBIG, "as the system says"),
    "no further thread": RuntimeError("can't start new thread"),
    "no further thread or process": BlockingIOError(errno.EAGAIN, "as the system says"),
    "thread": Exception("ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock"),
    "memory": MemoryError("Unable to allocate 4.00 GiB"),
    "memory is used": OSError(errno.ENOMEM, "as the system says"),
    "ulimit -n": RuntimeError("unable to open file: Too many open files (24)"),
    "is used up": ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    "used up": RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
}
"""Part of the message -> error of Python, torch or a library in Rust."""


@pytest.mark.parametrize("message", LIMITS)
def test_a_limit_is_named_wherever_it_is_met(message: str, tmp_path: Path) -> None:
    error = LIMITS[message]
    for context in (translate_any_disk_errors(), translate_disk_errors(tmp_path)):
        with pytest.raises(LimitError, match=message), context:
            raise error
    assert LimitError.exit_code == 5


def raised_from(cause: Exception) -> Exception:
    """The error of a library that met `cause`."""
    try:
        try:
            raise cause
        except Exception as error:
            raise ValueError("as the library says") from error
    except ValueError as error:
        return error


def test_a_cause_is_found_behind_the_error_of_a_library() -> None:
    assert isinstance(system_error(raised_from(OSError(errno.EMFILE, ""))), LimitError)
    assert isinstance(system_error(raised_from(OSError(errno.ENOSPC, ""))), NoSpaceError)
    assert isinstance(system_error(raised_from(OSError(errno.EROFS, "", "file"))), UsageError)
    assert system_error(raised_from(KeyError("name"))) is None
    # A missing file that a library handled is not why it failed.
    assert system_error(raised_from(FileNotFoundError(errno.ENOENT, "", "file"))) is None


@pytest.mark.parametrize("kind", [DataError, ModelError])
def test_texts_and_models_are_not_blamed_for_a_limit(kind: type[Exception]) -> None:
    def load(cause: Exception) -> None:
        try:
            raise raised_from(cause)
        except ValueError:
            raise kind("cannot be loaded") from None

    with pytest.raises(LimitError, match="ulimit -n"), translate_any_disk_errors():
        load(OSError(errno.EMFILE, ""))
    with pytest.raises(LimitError, match="no further thread"), translate_any_disk_errors():
        load(RuntimeError("can't start new thread"))
    with pytest.raises(NoSpaceError), translate_any_disk_errors():
        load(OSError(errno.ENOSPC, ""))
    for cause in (KeyError("name"), FileNotFoundError(errno.ENOENT, "", "file"), MemoryError()):
        with pytest.raises(kind, match="cannot be loaded"), translate_any_disk_errors():
            load(cause)


@pytest.mark.parametrize("compact", [False, True])
def test_more_shards_are_written_at_once_than_files_may_be_open(
    tmp_path: Path, compact: bool
) -> None:
    """In a process of its own: neither the soft nor the hard limit holds 60 files."""
    code = f"""
import resource, numpy as np
from pathlib import Path
from residua.cache.format.compressed_shard import shard_writer_for
from residua.cache.format.layout import ArrayLayout
layout = ArrayLayout((64, 4), "<f4", "float32", 16, 64, raw={not compact}, compact={compact})
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
rows = np.arange(256, dtype="<f4").reshape(64, 4)
folder = Path({str(tmp_path)!r})
writers = [shard_writer_for(folder / str(n) / "c/0/0", layout, 64) for n in range(60)]
for start in range(0, 64, 32):
    for writer in writers:
        writer.write(start, rows[start:start + 32])
print(len({{tuple(writer.commit().items()) for writer in writers}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    # The files are those of a writer that may keep its file open.
    layout = ArrayLayout((64, 4), "<f4", "float32", 16, 64, raw=not compact, compact=compact)
    rows = np.arange(256, dtype="<f4").reshape(64, 4)
    writer = shard_writer_for(tmp_path / "c/0/0", layout, 64)
    writer.write(0, rows)
    writer.commit()
    files = {path.read_bytes() for path in tmp_path.rglob("c/0/0")}
    assert len(files) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_limit_of_open_files_is_named_where_it_cannot_be_raised(tmp_path: Path) -> None:
    layout = ArrayLayout((64, 4), "<f4", "float32", 16, 64, raw=True)
    writer = shard_writer_for(tmp_path / "shard", layout, 64)
    writer.write(0, np.zeros((64, 4), "<f4"))
    writer.commit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = f"""
import resource
from pathlib import Path
from residua.cache.errors import LimitError
from residua.cache.format.layout import ArrayLayout
from residua.cache.format.shard import ShardReader
layout = ArrayLayout((64, 4), "<f4", "float32", 16, 64, raw=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
readers = []
try:
    for number in range(20):
        readers.append(ShardReader(Path({str(tmp_path)!r}) / "shard", layout))
except LimitError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "this process may have 20 open at a time" in done.stdout, done.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_a_thread_that_cannot_start_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LimitError, match="OMP_NUM_THREADS=1"), translate_any_disk_errors():
        threading.Thread(target=print).start()
