"""Claims about files below a cache: names stay below it, and only regular files are opened."""

import os
import socket
from pathlib import Path

import pytest

from residua.cache.errors import CorruptError, NotFoundError
from residua.cache.files.confined_files import (
    check_folders,
    check_regular,
    confined_digest,
    confined_path,
    is_confined_name,
    is_regular,
    read_confined,
    read_confined_json,
)
from residua.cache.files.json_files import file_digest, write_json

BAD_NAMES = (
    "", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a\0b", "a\\b",
    "x" * 5000, "\ud800", None, 3, ["a"],
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_names_that_lead_out_of_the_folder_or_are_no_names_are_refused(tmp_path: Path, name):
    assert not is_confined_name(name)
    for function in (check_regular, read_confined, confined_path, confined_digest):
        with pytest.raises(CorruptError, match="no relative name"):
            function(tmp_path, name)


def test_a_regular_file_is_read_through_real_folders(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"content")
    assert read_confined(tmp_path, "a/b/c") == b"content"
    assert confined_digest(tmp_path, "a/b/c") == file_digest(tmp_path / "a/b/c")
    assert is_regular(tmp_path, "a/b/c")
    assert not is_regular(tmp_path, "a/b/d")
    assert confined_path(tmp_path, "a/b/new") == tmp_path / "a/b/new"
    with pytest.raises(CorruptError, match="has 7 bytes"):
        read_confined(tmp_path, "a/b/c", most=6)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert read_confined(tmp_path / "link", "file") == b"x"
    assert is_regular(tmp_path / "link", "file")


def make_odd_file(path: Path, kind: str, target: Path) -> None:
    """Put a file of `kind` at `path`."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder", "socket"])
def test_no_other_kind_of_file_is_opened_or_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.chdir(folder)  # sockets have short names
    make_odd_file(Path("odd"), kind, tmp_path / "outside")
    word = kind.rpartition(" ")[2]
    for function in (check_regular, is_regular, read_confined, confined_digest):
        with pytest.raises(CorruptError, match=f"is a {word}, where a cache has a regular file"):
            function(folder, "odd")
    with pytest.raises(CorruptError, match=f"is a {word}"):
        read_confined_json(folder, "odd")
    if kind != "folder":
        with pytest.raises(CorruptError, match=f"is a {word}, where a cache has a folder"):
            check_folders(folder, ("absent", "odd"))
        for function in (check_regular, read_confined, confined_path):
            with pytest.raises((CorruptError), match=f"is a {word}, where a cache has a folder"):
                function(folder, "odd/file")


def test_no_link_on_the_way_is_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"secret")
    folder = tmp_path / "cache"
    (folder / "a").mkdir(parents=True)
    (folder / "a/link").symlink_to(tmp_path / "outside")
    for function in (check_regular, is_regular, read_confined, confined_path):
        with pytest.raises(CorruptError, match="is a link, where a cache has a folder"):
            function(folder, "a/link/file")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_confined(tmp_path, "a/b")
    with pytest.raises(NotFoundError, match="is missing"):
        read_confined_json(tmp_path, "record.json")
    write_json(tmp_path / "record.json", {"a": 1})
    assert read_confined_json(tmp_path, "record.json") == {"a": 1}


def test_descriptors_are_closed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"x")
    (tmp_path / "a/link").symlink_to("file")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a/file", "a/link", "a/absent", "absent/x", "a") * 20:
        try:
            read_confined(tmp_path, name)
        except (CorruptError, FileNotFoundError):
            continue
    assert len(os.listdir("/proc/self/fd")) == before
