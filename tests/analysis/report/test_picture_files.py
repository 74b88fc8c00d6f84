"""Reports and pictures appear whole; what a killed writer left is removed by the next."""

import fcntl
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from residua.analysis.report.picture_files import write_figure
from residua.cache.files.json_files import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kl.png"
    write_figure(Figure(), file)
    whole = file.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def fail(self: Figure, target: Any, **_: Any) -> None:
        target.write(b"half a picture")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        write_figure(Figure(), file)
    assert file.read_bytes() == whole
    assert names(tmp_path) == ["kl.png"]


def test_temporary_files_of_killed_writers_are_swept_and_those_of_others_stay(
    tmp_path: Path,
) -> None:
    file = tmp_path / "[report].html"
    for name in (".[report].html.1.tmp", ".[report].html.2.tmp", ".r.html.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with open(tmp_path / ".[report].html.2.tmp", "rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_atomically(file, b"whole")
        assert names(tmp_path) == [".[report].html.2.tmp", ".r.html.1.tmp", "[report].html"]
    write_atomically(file, b"again", sweep=False)
    assert names(tmp_path) == [".[report].html.2.tmp", ".r.html.1.tmp", "[report].html"]
    write_atomically(file, b"again")
    assert names(tmp_path) == [".r.html.1.tmp", "[report].html"]
