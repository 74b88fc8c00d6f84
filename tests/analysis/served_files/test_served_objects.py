"""What a service gives of a root, and that no path leads to anything else."""

import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.analysis.served_files.open_files import OpenFiles
from residua.analysis.served_files.served_objects import ServedFiles, split_name
from residua.cache.errors import CorruptError, NotFoundError
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

SECRET = b"a secret outside of what is served"


def random_cache(root: Path, seed: int = 0) -> ActivationCache:
    """A cache of three parts and two layers."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(2)]
    return make_cache(root, layers, [40] * 16, random_head(8, 32), seed=seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a cache, a probe, and secrets beside them, reached by links, too."""
    folder = tmp_path_factory.mktemp("served")
    root = folder / "root"
    cache = random_cache(root)
    (folder / "outside").mkdir()
    (folder / "outside" / "manifest.json").write_bytes(SECRET)
    probe = root / "probes" / "ridge-1"
    probe.mkdir(parents=True)
    (probe / "config.json").write_text("{}")
    (probe / "probe.safetensors").write_bytes(b"\0" * 8)
    secrets = [
        root / ".service" / "tokens.json",
        root / "jobs" / "1" / "request.json",
        root / "notes.txt",
        root / "probes" / "notes.txt",
        root / "probes" / ".hidden" / "config.json",
        probe / "notes.txt",
        cache.path / "local.json",
        cache.path / "notes.txt",
        cache.path / "journal" / ".00000000.json.7.tmp",
        cache.path / ".partial" / "manifest.json",
        root / ("0" * 63) / "manifest.json",
        root / ("A" * 64) / "manifest.json",
    ]
    for secret in secrets:
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.write_bytes(SECRET)
    # Links and other kinds of files under names that are served.
    (root / ("1" * 64)).symlink_to(folder / "outside")
    (root / ("2" * 64)).mkdir()
    (root / ("2" * 64) / "manifest.json").symlink_to(folder / "outside" / "manifest.json")
    (root / ("2" * 64) / "head").symlink_to(folder / "outside")
    os.mkfifo(root / ("2" * 64) / "provenance.json")
    (root / "probes" / "linked").symlink_to(folder / "outside")
    return root


@pytest.fixture
def files(root: Path) -> Any:
    served = ServedFiles(root)
    yield served
    served.close()


def cache_of(root: Path) -> ActivationCache:
    (path,) = (
        p for p in root.iterdir() if (p / "journal" / "base.json").exists() and not p.is_symlink()
    )
    return ActivationCache(path)


def read_whole(files: ServedFiles, path: str) -> bytes:
    served = files.find(path)
    try:
        return served.read(0, served.size) if served.size else b""
    finally:
        served.close()


def test_every_file_of_the_format_is_given_as_it_is(files: ServedFiles, root: Path) -> None:
    cache = cache_of(root)
    entries, after = files.list_entries(f"caches/{cache.id}", recursive=True)
    assert after is None
    hidden = {"local.json", "notes.txt", "journal/.00000000.json.7.tmp", ".partial/manifest.json"}
    names = {p.relative_to(cache.path).as_posix() for p in cache.path.rglob("*") if p.is_file()}
    assert {entry.name for entry in entries} == names - hidden
    for entry in entries:
        data = read_whole(files, f"caches/{cache.id}/{entry.name}")
        assert data == (cache.path / entry.name).read_bytes()
        assert entry.bytes == len(data)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "caches",
        "probes",
        "notes.txt",
        "caches/notes.txt",
        "caches/.service/tokens.json",
        ".service/tokens.json",
        "jobs/1/request.json",
        "caches/jobs/1/request.json",
        "probes/notes.txt",
        "probes/ridge-1",
        "probes/ridge-1/notes.txt",
        "probes/.hidden/config.json",
        "probes/linked/manifest.json",
        "probes/linked/config.json",
        f"caches/{'0' * 63}/manifest.json",
        f"caches/{'A' * 64}/manifest.json",
        f"caches/{'1' * 64}/manifest.json",
        f"caches/{'2' * 64}/manifest.json",
        f"caches/{'2' * 64}/head/manifest.json",
        f"caches/{'2' * 64}/provenance.json",
        f"caches/{'3' * 64}/manifest.json",
        f"caches/{'2' * 64}/head",
    ],
)
def test_nothing_else_is_given(files: ServedFiles, path: str) -> None:
    with pytest.raises(NotFoundError) as error:
        files.find(path)
    assert str(files.root) not in str(error.value)


def hostile_paths(root: Path, count: int) -> list[str]:
    """Paths made of pieces of right ones, of ways out, and of letters that look like them."""
    rng = random.Random(0)
    cache = cache_of(root)
    right = [
        *("/".join(("caches", cache.id, p.relative_to(cache.path).as_posix()))
          for p in cache.path.rglob("*")),
        "probes/ridge-1/config.json",
        f"caches/{'1' * 64}/manifest.json",
        f"caches/{'2' * 64}/head/manifest.json",
        ".service/tokens.json",
        "jobs/1/request.json",
    ]  # fmt: skip
    ways = [
        "..", ".", "", "...", "%2e%2e", "..%2f", "%2f", "..\\", "\\", "\0", "..\0", "~", "//",
        "/etc/passwd", "/", str(root), str(root.parent / "outside"), "\uff0e\uff0e", "\u2025",
        "\u2024\u2024", "\uff0f", "\u2215", "\u2044", "\ufe68", "\ufffd", "\udc2e\udc2e", "\u202e",
        "\u200b", "a\u0301", "\u00e1", " ", "..;", ".service", "tokens.json", "outside",
        "manifest.json", "journal", "local.json", "con", "nul.json", "c:", "file://", "x" * 300,
        "x" * 5000, "-1", "*", "?", "#", "\n", "\r\n", "\x7f", "\x80",
    ]  # fmt: skip
    paths = []
    for _ in range(count):
        parts = rng.choice(right).split("/")
        for _ in range(rng.randint(1, 4)):
            way, position = rng.choice(ways), rng.randrange(len(parts) + 1)
            action = rng.randrange(5)
            if action == 0:
                parts.insert(position, way)
            elif action == 1 and position < len(parts):
                parts[position] = way
            elif action == 2 and position < len(parts):
                cut = rng.randrange(len(parts[position]) + 1)
                parts[position] = parts[position][:cut] + way + parts[position][cut:]
            elif action == 3:
                parts = [*parts[:position], *[way] * rng.randint(1, 6), *parts[position:]]
            else:
                form = rng.choice(("NFC", "NFD", "NFKC", "NFKD"))
                parts = unicodedata.normalize(form, "/".join(parts)).split("/")
        paths.append("/".join(parts))
    return paths


def test_100_000_hostile_paths_lead_to_served_files_alone(root: Path) -> None:
    files = ServedFiles(root)
    cache = cache_of(root)
    allowed = {
        os.path.realpath(path)
        for path in (*cache.path.rglob("*"), *(root / "probes" / "ridge-1").iterdir())
        if path.name not in ("local.json", "notes.txt") and "/." not in str(path)
    }
    given = 0
    for path in hostile_paths(root, 100_000):
        try:
            served = files.find(path)
        except NotFoundError:
            continue
        given += 1
        # The very file that is open, not a name of it.
        target = os.readlink(f"/proc/self/fd/{served._file.descriptor}")  # pyright: ignore[reportAttributeAccessIssue]
        assert target in allowed, path
        assert SECRET not in served.read(0, min(served.size, 100))
        served.close()
    files.close()
    assert 0 < given < 50_000  # some of the changes change nothing


def test_names_are_told_apart_without_looking_anywhere() -> None:
    cache = "ab" * 32
    assert split_name(f"caches/{cache}/arrays.zarr/sequences/labels/\u00e1 b/c/0") is not None
    assert split_name(f"caches/{cache}/arrays.zarr/a\nb") is None
    assert split_name(f"caches/{cache}//manifest.json") is None
    assert split_name(f"caches/{cache}/arrays.zarr/.zarray") is None
    assert split_name(f"caches/{cache}/moments/../local.json") is None
    assert split_name("probes/ridge/config.json/x") is None


def test_a_committed_shard_has_the_tag_of_its_record(files: ServedFiles, root: Path) -> None:
    cache = cache_of(root)
    shard = files.find(f"caches/{cache.id}/arrays.zarr/residual/1/c/2/0")
    record = cache.journal.parts()[2].arrays["residual/1"]
    assert shard.etag == f'"{record.crc32c:08x}-{record.bytes:x}"'
    assert shard.is_immutable
    table = files.find(f"caches/{cache.id}/arrays.zarr/tokens/ids/c/0")
    record = cache.journal.base()[0]["tokens/ids"]["0"]
    assert table.etag == f'"{record.crc32c:08x}-{record.bytes:x}"'
    for name in ("manifest.json", "journal/base.json", "arrays.zarr/residual/1/zarr.json"):
        served = files.find(f"caches/{cache.id}/{name}")
        assert not served.is_immutable
        served.close()
    shard.close()
    table.close()


def test_a_shard_counts_as_committed_from_its_record_on(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    record = cache.path / "journal" / "00000001.json"
    raw = record.read_bytes()
    record.unlink()
    files, path = ServedFiles(tmp_path), f"caches/{cache.id}/arrays.zarr/residual/0/c/1/0"
    before = files.find(path)
    assert not before.is_immutable
    record.write_bytes(raw)
    after = files.find(path)
    assert after.is_immutable
    assert after.etag != before.etag
    # A damaged record commits nothing, and no other request suffers.
    record.unlink()
    record.write_bytes(raw.replace(b"crc32c", b"crc32d"))
    assert not files.find(path).is_immutable
    assert files.find(path.replace("c/1/0", "c/0/0")).is_immutable
    # Nor does one of another size than the file.
    record.unlink()
    record.write_bytes(raw)
    with (cache.path / path.split("/", 2)[2]).open("ab") as file:
        file.write(b"x")
    assert not files.find(path).is_immutable


def test_a_replaced_file_has_another_tag_and_its_new_bytes(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    files, path = ServedFiles(tmp_path), f"caches/{cache.id}/provenance.json"
    old = files.find(path)
    content = (cache.path / "provenance.json").read_bytes()
    new = cache.path / "new"
    new.write_bytes(bytes(reversed(content)))
    os.replace(new, cache.path / "provenance.json")
    replaced = files.find(path)
    assert replaced.etag != old.etag
    assert replaced.read(0, replaced.size) == bytes(reversed(content))
    assert old.read(0, old.size) == content  # a reader goes on with what it began
    old.close()
    (cache.path / "provenance.json").unlink()
    with pytest.raises(NotFoundError):
        files.find(path)
    assert files.find_open(path) is None


def test_a_file_that_becomes_a_link_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = random_cache(tmp_path / "root")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    files, path = ServedFiles(tmp_path / "root"), f"caches/{cache.id}/provenance.json"
    files.find(path).close()
    (cache.path / "provenance.json").unlink()
    (cache.path / "provenance.json").symlink_to(secret)
    with pytest.raises(NotFoundError):
        files.find(path)
    # Nor is a folder on the way, even if the file behind it was open before, for long.
    head = f"caches/{cache.id}/head/head.json"
    files.find(head).close()
    os.rename(cache.path / "head", tmp_path / "moved")
    (cache.path / "head").symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "other.json").write_bytes(SECRET)
    with pytest.raises(NotFoundError):
        files.find(f"caches/{cache.id}/head/other.json")
    monkeypatch.setattr("residua.analysis.served_files.open_files.REOPEN_SECONDS", 0.0)
    with pytest.raises(NotFoundError):
        files.find(head)


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    served = ServedFiles(tmp_path).find(f"caches/{cache.id}/provenance.json")
    os.truncate(cache.path / "provenance.json", 5)
    with pytest.raises(CorruptError, match="cut short"):
        served.read(0, served.size)


def test_few_files_stay_open(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(b"x")
    opened = OpenFiles(4)
    held = opened.add(tmp_path, "0")
    for number in range(1, 20):
        opened.give_back(opened.add(tmp_path, str(number)))
    assert len(opened) == 4
    assert os.pread(held.descriptor, 1, 0) == b"x"  # it is being read
    opened.give_back(held)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(held.descriptor)
    again = opened.get("19")
    assert again is not None
    opened.close()
    assert len(opened) == 0
    assert os.pread(again.descriptor, 1, 0) == b"x"
    opened.give_back(again)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(again.descriptor)


def test_listings_name_folders_and_sizes_and_go_on_where_they_ended(
    files: ServedFiles, root: Path
) -> None:
    cache = cache_of(root)
    assert [e.name for e in files.list_entries("caches")[0]] == sorted([cache.id, "2" * 64])
    assert [(e.name, e.bytes) for e in files.list_entries("probes")[0]] == [("ridge-1", None)]
    probe = files.list_entries("probes/ridge-1")[0]
    assert [(e.name, e.bytes) for e in probe] == [("config.json", 2), ("probe.safetensors", 8)]
    head = files.list_entries(f"caches/{cache.id}")[0]
    assert ("arrays.zarr", None) in [(e.name, e.bytes) for e in head]
    for recursive in (False, True):
        path = f"caches/{cache.id}" + ("" if recursive else "/journal")
        whole, after = files.list_entries(path, recursive)
        assert after is None
        pages, after = [], ""
        while after is not None:
            page, after = files.list_entries(path, recursive, after, limit=2)
            pages += page
        assert pages == whole
        assert len(pages) > 3
    for path in ("caches/x", "jobs", "probes/linked", f"caches/{'1' * 64}", "caches/.."):
        with pytest.raises(NotFoundError):
            files.list_entries(path)
    with pytest.raises(NotFoundError):
        files.list_entries("caches", recursive=True)


def test_objects_of_a_store_are_given_alike(tmp_path: Path) -> None:
    """A root behind fsspec, here in memory, gives the same bytes, tags and listings."""
    from residua.cache.files.paths import as_path, upload_folder

    cache = random_cache(tmp_path)
    remote = as_path(f"memory://{tmp_path.name}-{random.randrange(1 << 30)}")
    upload_folder(cache.path, remote / cache.id)
    local, stored = ServedFiles(tmp_path), ServedFiles(remote)
    entries, _ = local.list_entries(f"caches/{cache.id}", recursive=True)
    assert stored.list_entries(f"caches/{cache.id}", recursive=True)[0] == entries
    for entry in entries:
        path = f"caches/{cache.id}/{entry.name}"
        ours, theirs = local.find(path), stored.find(path)
        assert read_whole(local, path) == read_whole(stored, path)
        assert theirs.read(1, 5) == ours.read(1, 5)
        assert ours.is_immutable == theirs.is_immutable
        assert not ours.is_immutable or ours.etag == theirs.etag
        ours.close()
    for path in (f"caches/{cache.id}/head", f"caches/{cache.id}/no.json", "caches/../x/y"):
        with pytest.raises(NotFoundError):
            stored.find(path)
    assert json.loads(read_whole(stored, f"caches/{cache.id}/manifest.json"))["id"] == cache.id
