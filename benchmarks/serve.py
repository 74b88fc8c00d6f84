"""Bytes from the service: CPU seconds of the server per GB, beside nginx with sendfile.

    python benchmarks/serve.py                # 3 GB of each kind in every round
    python benchmarks/serve.py --gb .2        # a short trial

Whole shards, and chunks of 2 MiB at random places, by one client and by eight at the same time,
all on this machine over the loopback interface. Both servers are one process, give the same files,
which are in memory, and take turns. The seconds are those that each server's process used, system
calls included, by GB; the note says how much a second it sent, as a share of what nginx sent. The
clients run on the same cores.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from results import Figure, write_results

from residua.tests.support.synthetic import make_cache, random_head

RANGE_BYTES = 2 << 20
TICKS = os.sysconf("SC_CLK_TCK")
NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    open_file_cache max=256;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location /caches/ {{ alias {root}/; }}
    }}
}}
"""


@dataclass(frozen=True)
class RunningServer:
    """A server on this machine."""

    port: int
    pid: int
    """Of the one process that answers."""

    def cpu_seconds(self) -> float:
        """CPU time that the process used so far, in the system, too."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=3.0, help="GB of each kind and round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--positions", type=int, default=1 << 16)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that listens at `port`, stopped at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended: {process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[RunningServer]:
    """One worker of nginx that gives the files under `root`."""
    port = free_port()
    config = folder / "nginx.conf"
    user = "user root;" if os.getuid() == 0 else ""
    config.write_text(user + NGINX.format(root=root, folder=folder, port=port))
    with running(["nginx", "-c", str(config), "-e", str(folder / "error.log")], port) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield RunningServer(port, int(children[0]))


@contextmanager
def residua_serve(root: Path) -> Iterator[RunningServer]:
    """The service of residua."""
    port = free_port()
    command = [sys.executable, "-m", "residua", "serve", "--root", str(root), "--port", str(port)]
    with running(command, port) as process:
        yield RunningServer(port, process.pid)


def receive_response(connection: socket.socket, buffer: memoryview) -> int:
    """Read one answer with a Content-Length, and return the bytes of its body."""
    head = b""
    while b"\r\n\r\n" not in head:
        if not (piece := connection.recv(4096)):
            raise ConnectionError("the server closed the connection")
        head += piece
    header, _, body = head.partition(b"\r\n\r\n")
    if header.split(b" ")[1] not in (b"200", b"206"):
        raise ConnectionError(header.decode())
    fields = header.lower().split(b"content-length: ")[1]
    size = int(fields.split(b"\r\n")[0])
    missing = size - len(body)
    while missing:
        if not (count := connection.recv_into(buffer[: min(missing, len(buffer))])):
            raise ConnectionError("the server closed the connection")
        missing -= count
    return size


def fetch(server: RunningServer, requests: Iterator[bytes], total: int) -> None:
    """Send requests over one connection until `total` bytes came."""
    buffer = memoryview(bytearray(1 << 20))
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.settimeout(60)
        while total > 0:
            connection.sendall(next(requests))
            total -= receive_response(connection, buffer)


def shard_requests(names: list[str], seed: int) -> Iterator[bytes]:
    """Requests for whole shards, one after the other."""
    number = seed
    while True:
        name = names[number % len(names)]
        yield f"GET /caches/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        number += 1


def range_requests(names: list[str], seed: int, size: int) -> Iterator[bytes]:
    """Requests for ranges of `RANGE_BYTES` at random places in shards of `size` bytes."""
    random = np.random.default_rng(seed)
    while True:
        name, start = names[random.integers(len(names))], random.integers(size - RANGE_BYTES)
        yield (
            f"GET /caches/{name} HTTP/1.1\r\nHost: localhost\r\n"
            f"Range: bytes={start}-{start + RANGE_BYTES - 1}\r\n\r\n"
        ).encode()


def measure(
    server: RunningServer,
    requests_of: Callable[[int], Iterator[bytes]],
    connections: int,
    total: int,
) -> tuple[float, float]:
    """CPU seconds of the server and wall seconds, per GB, while clients fetch `total` bytes."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fetch(server, requests_of(number), total // connections)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    cpu, wall = server.cpu_seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    wall, cpu = time.perf_counter() - wall, server.cpu_seconds() - cpu
    return cpu / total * 1e9, wall / total * 1e9


def measure_figures(
    ours: RunningServer, theirs: RunningServer, cache: Path, args: argparse.Namespace
) -> list[Figure]:
    """All kinds of requests, both servers in turn."""
    shards = sorted((cache / "arrays.zarr" / "residual" / "0" / "c").glob("*/0"))
    names = [f"{cache.name}/{path.relative_to(cache)}" for path in shards]
    size = min(path.stat().st_size for path in shards)
    kinds: dict[str, tuple[str, Callable[[int], Iterator[bytes]], int]] = {
        "serve_shards": (
            f"whole shards of {size / 1e6:.0f} MB, one connection",
            lambda seed: shard_requests(names, seed),
            1,
        ),
        "serve_ranges": (
            "ranges of 2 MiB, one connection",
            lambda seed: range_requests(names, seed, size),
            1,
        ),
        "serve_ranges_8": (
            "ranges of 2 MiB, 8 connections",
            lambda seed: range_requests(names, seed, size),
            8,
        ),
    }
    figures, total = [], int(args.gb * 1e9)
    for key, (what, requests_of, connections) in kinds.items():
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for number in range(-1, args.rounds):
            for name, server in (("ours", ours), ("theirs", theirs)):
                share = total if number >= 0 else max(total // 10, 100_000_000)
                seconds = measure(server, requests_of, connections, share)
                if number >= 0:
                    times[name].append(seconds)
        speeds = [b[1] / a[1] for a, b in zip(times["ours"], times["theirs"], strict=True)]
        figures.append(
            Figure(
                key,
                f"a GB of {what}, {args.rounds} x {args.gb:g} GB, in the server",
                "nginx, one worker, sendfile",
                [cpu for cpu, _ in times["ours"]],
                [cpu for cpu, _ in times["theirs"]],
                f"bytes a second: {median(speeds):.2f} times nginx's",
            )
        )
    return figures


def main() -> None:
    args = arguments()
    if shutil.which("nginx") is None:
        raise SystemExit("nginx, the baseline, is not installed (Debian: apt-get install nginx)")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder) / "root"
        values = np.random.default_rng(0).integers(-1000, 1000, (args.positions, args.d_model))
        cache = make_cache(
            root,
            [values.astype(np.float32)],
            [args.positions],
            random_head(args.d_model, 10),
            part_rows=args.positions // 4,
        )
        del values
        ours = stack.enter_context(residua_serve(root))
        theirs = stack.enter_context(nginx(root, Path(folder)))
        write_results(args.json, measure_figures(ours, theirs, cache.path, args))


if __name__ == "__main__":
    main()
