"""OpenStack Swift with its S3 API: one proxy, and a folder as its only disk.

apt-get install memcached; pip install swift==2.38.3 in an environment of its own, its bin in PATH.
"""

import contextlib
import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from servers import HOST, Server, free_ports, make_bucket, running

STORAGE = ("account", "container", "object")
PROGRAMS = (
    "memcached",
    "swift-ring-builder",
    "swift-proxy-server",
    *(f"swift-{kind}-server" for kind in STORAGE),
)
MIN_VERSION = (2, 38)
COMMON = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
workers = 0
log_address = {folder}/no-syslog
"""
STORES = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY = """
[pipeline:main]
pipeline = catch_errors cache listing_formats bulk s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = {host}:{memcache}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_residua_tester = testing .admin
user_residua_reader = reading
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


def reason_unavailable() -> str:
    """Reason why Swift cannot run on this machine; empty if it can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"OpenStack Swift is not installed: no {', '.join(absent)} in PATH"
    version = _version()
    if tuple(int(number) for number in version.split(".")[:2]) < MIN_VERSION:
        return f"OpenStack Swift {version} refuses If-None-Match; 2.38.3 does not"
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.swift.metadata", b"x" * 1024)
        except OSError as error:
            return f"Swift needs extended attributes, which {tempfile.gettempdir()} lacks: {error}"
    return ""


@contextlib.contextmanager
def serve(folder: Path, seconds: float) -> Iterator[Server]:
    """Context with Swift in `folder`, with single replicas."""
    proxy, memcache, *ports = free_ports(2 + len(STORAGE))
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = residua\n")
    fields = {"host": HOST, "user": getpass.getuser(), "folder": folder, "memcache": memcache}
    for kind, port in zip(STORAGE, ports, strict=True):
        text = COMMON + STORES
        (folder / f"{kind}.conf").write_text(text.format(**fields, kind=kind, port=port))
        _build_ring(folder / f"{kind}.builder", port)
    (folder / "proxy.conf").write_text((COMMON + PROXY).format(**fields, port=proxy))
    commands = [
        ("memcached", "-l", HOST, "-p", memcache, "-u", getpass.getuser()),
        *((f"swift-{kind}-server", folder / f"{kind}.conf") for kind in (*STORAGE, "proxy")),
    ]
    with running(commands, folder):
        # Swift checks before it writes: it accepts both of two simultaneous creations.
        yield make_bucket(Server(f"http://{HOST}:{proxy}", atomic=False), seconds, folder)


def _version() -> str:
    """The version of Swift that the programs belong to."""
    program = shutil.which("swift-proxy-server")
    assert program
    with open(program) as file:
        python = file.readline().removeprefix("#!").split()
    command = [*python, "-c", "import swift; print(swift.__version__)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _build_ring(builder: Path, port: int) -> None:
    """Build a ring of one device with 16 partitions and 1 replica."""
    for words in (
        ("create", "4", "1", "1"),
        ("add", f"r1z1-{HOST}:{port}/disk", "1"),
        ("rebalance",),
    ):
        command = ["swift-ring-builder", str(builder), *words]
        process = subprocess.run(command, capture_output=True, text=True)
        # Exit code 1 is a warning, such as one on the small number of partitions.
        if process.returncode > 1:
            raise RuntimeError(f"{' '.join(command)}: {process.stdout}{process.stderr}")
