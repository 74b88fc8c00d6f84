"""Ceph's S3 gateway over one monitor and one object store in memory, from Debian's packages.

apt-get install --no-install-recommends radosgw ceph-mon ceph-osd
"""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from servers import HOST, Server, free_ports, make_bucket, running, wait_until

PROGRAMS = ("monmaptool", "ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")
CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v2:{host}:{monitor}
public addr = {host}
cluster addr = {host}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
crash dir = {folder}/crash
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
rgw data = {folder}/rgw
rgw frontends = beast endpoint={host}:{port}
rgw thread pool size = 64
"""


def reason_unavailable() -> str:
    """Reason why the gateway cannot run on this machine; empty if it can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    return f"Ceph's gateway is not installed: no {', '.join(absent)} in PATH" if absent else ""


@contextlib.contextmanager
def serve(folder: Path, seconds: float) -> Iterator[Server]:
    """Context with a cluster that has its files in `folder` and its objects in memory."""
    port, monitor = free_ports(2)
    fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
    for name in ("mon", "osd", "rgw", "crash"):
        (folder / name).mkdir()
    text = CONFIGURATION.format(fsid=fsid, host=HOST, monitor=monitor, port=port, folder=folder)
    (folder / "ceph.conf").write_text(text)
    environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}
    server = Server(f"http://{HOST}:{port}")

    def run(*words: str) -> None:
        process = _call(words, folder, environment, seconds)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: {process.stdout}{process.stderr}")

    def register_disk() -> bool:
        words = ("ceph", "--connect-timeout", "5", "osd", "new", disk)
        return _call(words, folder, environment, seconds).returncode == 0

    with contextlib.ExitStack() as stack:

        def start(*command: str) -> None:
            (folder / command[0]).mkdir()
            stack.enter_context(running([command], folder / command[0], environment))

        address = f"[v2:{HOST}:{monitor}]"
        run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, "map")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "map")
        start("ceph-mon", "-f", "-i", "a")
        wait_until(register_disk, seconds, folder / "ceph-mon")
        run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", disk)
        start("ceph-osd", "-f", "-i", "0")
        reader, secret = server.reader
        run(
            *("radosgw-admin", "user", "create"),
            *("--uid", "residua", "--display-name", "residua"),
            *("--access-key", server.key, "--secret-key", server.secret),
        )
        run(
            *("radosgw-admin", "subuser", "create"),
            *("--uid", "residua", "--subuser", reader, "--access", "read"),
            *("--key-type", "s3", "--access-key", reader, "--secret", secret),
        )
        start("radosgw", "-f", "-n", "client.rgw")
        yield make_bucket(server, seconds, folder / "radosgw")


def _call(
    words: Sequence[str], folder: Path, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )
