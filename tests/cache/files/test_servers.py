"""What residua asks of an S3 server: said by the mock in every run, by real servers when slow."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ...support.servers import Server, is_answering, serving, wait_until

CLIENTS = Path(__file__).parents[2] / "support" / "clients.py"


def start_client(server: Server, *words: str) -> subprocess.Popen[str]:
    """One of clients.py, on `server`."""
    return subprocess.Popen(
        [sys.executable, str(CLIENTS), *words],
        env={**os.environ, **server.environment()},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def s3_files() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


def unfinished_uploads(server: Server, prefix: str) -> list[tuple[str, str]]:
    """Key and id of each upload under `prefix` that was begun and not ended."""
    listing = server.client().list_multipart_uploads(Bucket=server.bucket, Prefix=prefix)
    return [(upload["Key"], upload["UploadId"]) for upload in listing.get("Uploads", [])]


def test_a_second_create_is_refused(s3_server: Server, s3_root: str):
    s3_files().pipe_file(f"{s3_root}/part", b"first", mode="create")
    with pytest.raises(OSError, match="pre-conditions|Errno 22") as caught:
        s3_files().pipe_file(f"{s3_root}/part", b"second", mode="create")
    assert caught.value.__cause__.response["Error"]["Code"] == "PreconditionFailed"  # type: ignore[union-attr]
    assert s3_files().cat_file(f"{s3_root}/part") == b"first"


def test_of_two_creates_at_once_one_is_refused(s3_server: Server, s3_root: str):
    prefix = s3_root.removeprefix(f"s3://{s3_server.bucket}/")
    racers = {byte: start_client(s3_server, "create", s3_server.bucket, byte) for byte in "ab"}
    for number in range(20):
        for racer in racers.values():
            assert racer.stdin
            racer.stdin.write(f"{prefix}/{number}\n")
            racer.stdin.flush()
        statuses = {byte: racer.stdout.readline().strip() for byte, racer in racers.items()}  # type: ignore[union-attr]
        winners = [byte for byte, status in statuses.items() if status == "200"]
        assert set(statuses.values()) <= {"200", "409", "412"}
        assert len(winners) == 1 or (winners and not s3_server.atomic), statuses
        stored = s3_files().cat_file(f"{s3_root}/{number}").decode()
        assert stored in [byte * 1000 for byte in winners]
    for racer in racers.values():
        racer.communicate()


def test_a_killed_upload_leaves_nothing_to_see(s3_server: Server, s3_root: str):
    prefix = s3_root.removeprefix(f"s3://{s3_server.bucket}/")
    writer = start_client(s3_server, "upload", f"{s3_root}/shard")
    assert writer.stdout
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert s3_files().find(s3_root) == []
    assert not s3_files().exists(f"{s3_root}/shard")
    ((key, upload),) = unfinished_uploads(s3_server, prefix)
    assert key == f"{prefix}/shard"
    client = s3_server.client()
    client.abort_multipart_upload(Bucket=s3_server.bucket, Key=key, UploadId=upload)
    assert unfinished_uploads(s3_server, prefix) == []


def test_an_uploaded_file_is_read_by_any_range(s3_root: str):
    data = bytes(range(256)) * (6 << 12)
    with s3_files().open(f"{s3_root}/shard", "wb", block_size=5 << 20) as file:
        file.write(data)
    size = len(data)
    for first, last in ((0, 10), (5 << 20, (5 << 20) + 3), (size - 7, size), (-16, None)):
        assert s3_files().cat_file(f"{s3_root}/shard", start=first, end=last) == data[first:last]


def test_a_listing_shows_what_was_just_put_and_deleted(s3_root: str):
    for number in range(20):
        s3_files().pipe_file(f"{s3_root}/{number}", b"x")
        assert len(s3_files().find(s3_root)) == number + 1
    for number in range(20):
        s3_files().rm_file(f"{s3_root}/{number}")
        assert len(s3_files().find(s3_root)) == 19 - number


def test_a_reader_may_not_write(s3_server: Server, s3_root: str):
    key, secret = s3_server.reader
    reader = fsspec.filesystem("s3", key=key, secret=secret)
    with pytest.raises(PermissionError):
        reader.pipe_file(f"{s3_root}/part", b"x")
    assert s3_files().find(s3_root) == []


def test_a_wrong_secret_is_refused(s3_server: Server, s3_root: str):
    stranger = fsspec.filesystem("s3", key=s3_server.key, secret="guessed")
    with pytest.raises(PermissionError):
        stranger.pipe_file(f"{s3_root}/part", b"x")


def test_a_server_that_does_not_answer_is_an_error_with_its_words():
    with pytest.raises(RuntimeError, match="moto did not start"), serving("moto", seconds=0):
        pass


@pytest.mark.slow
def test_a_server_ends_with_the_process_that_asked_for_it(tmp_path: Path):
    code = (
        f"import sys; sys.path.insert(0, {str(CLIENTS.parent)!r}); import servers, time\n"
        "with servers.serving('moto') as server:\n"
        "    print(server.endpoint, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    url = parent.stdout.readline().strip()
    assert is_answering(url)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_answering(url), 20, tmp_path)
