"""A service under load: 200 readers for a minute while two jobs run.

    python benchmarks/load.py                      # 200 readers, 60 seconds
    python benchmarks/load.py --readers 20 --seconds 5

Half of the readers fetch random ranges of shards and compare their sha256 with that of the file;
the others ask for the catalogue, a cache, its parts and the probes. Two jobs, fits of ridge and
of a lens, run meanwhile; then the service gets SIGTERM in the middle of a last reading. Prints
requests, errors, the 50th and 99th percentile of seconds, and the resident memory of the server
over time. Readers and jobs run on the same cores as the server. Exit code 1 if anything was lost,
wrong or refused, if a job did not end well, or if memory grew by more than a tenth.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from residua.tests.support.synthetic import make_cache, random_head

RANGE_BYTES = 256 << 10
JOBS = (
    {"command": "fit ridge", "arguments": {"offsets": "0-3"}},
    {"command": "fit lens", "arguments": {"layers": "1", "steps": 50}},
)
START_SECONDS = 60
JOB_SECONDS = 600


@dataclass
class Tally:
    """What the readers saw."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Kind of request -> seconds of each."""
    bytes: int = 0
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server, once a second."""


class Connection:
    """A connection that is kept, and opened again if the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str, extra: str = "") -> tuple[int, bytes]:
        """Status and body of a GET."""
        is_kept = self.streams is not None
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self.streams
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"(?i)content-length: (\d+)", head)
            assert length is not None, head
            body = await reader.readexactly(int(length[1]))
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            if is_kept:  # closed between two requests
                return await self.get(path, extra)
            raise
        return int(head.split(" ", 2)[1]), body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        rng = np.random.default_rng(0)
        layers = [rng.normal(size=(1 << 15, 64)).astype(np.float32) for _ in range(4)]
        cache = make_cache(
            root, layers, [256] * 128, random_head(64, 512), part_rows=1 << 13, chunk_rows=1 << 10
        )
        value = measure(root, cache.path, options.readers, options.seconds)
    print(json.dumps(value, indent=2))
    if options.json:
        options.json.write_text(json.dumps(value, indent=2) + "\n")
    sys.exit(
        bool(value["errors"] or value["jobs"] != ["done"] * len(JOBS) or value["growth"] > 0.1)
    )


def measure(root: Path, cache: Path, readers: int, seconds: float) -> dict[str, Any]:
    """Start a service of `root`, load it, stop it; the figures."""
    token = "0123456789abcdef" * 2
    command = [sys.executable, "-m", "residua", "serve", "--root", str(root), "--port", "0"]
    command += ["--workers", "2"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RESIDUA_TOKEN": token}
    )
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "http://" in line)
        port = int(line.strip().rsplit(":", 1)[1])
        jobs = [submit(port, token, job, cache.name) for job in JOBS]
        tally = Tally()
        asyncio.run(load(port, server.pid, cache, readers, seconds, tally))
        states = [wait_for(port, job) for job in jobs]
        drained = asyncio.run(drain(port, server, cache))
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
    steady = tally.memory[len(tally.memory) // 4 :] or [1]
    return {
        "readers": readers,
        "seconds": seconds,
        "requests": {kind: len(times) for kind, times in tally.seconds.items()},
        "bytes": tally.bytes,
        "p50_ms": {kind: percentile(times, 50) for kind, times in tally.seconds.items()},
        "p99_ms": {kind: percentile(times, 99) for kind, times in tally.seconds.items()},
        "memory_mb": [round(value / 1e6, 1) for value in (steady[0], max(steady), steady[-1])],
        "growth": round(max(steady) / steady[0] - 1, 3),
        "jobs": states,
        "drained": drained,
        "errors": tally.errors[:10] + ([] if drained else ["an answer was cut by SIGTERM"]),
    }


def percentile(times: list[float], share: float) -> float:
    """In milliseconds."""
    return round(float(np.percentile(times, share)) * 1e3, 1)


def submit(port: int, token: str, job: dict[str, Any], cache: str) -> str:
    """Start `job` on the cache; returns its id."""
    arguments = {**job["arguments"], "cache": cache}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/jobs",
        json.dumps({**job, "arguments": arguments}).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        return json.load(answer)["id"]


def wait_for(port: int, job: str) -> str:
    """The state in which a job ends."""
    end = time.monotonic() + JOB_SECONDS
    while True:
        url = f"http://127.0.0.1:{port}/v1/jobs/{job}"
        with urllib.request.urlopen(url, timeout=START_SECONDS) as answer:
            state = json.load(answer)["state"]
        if state not in ("queued", "running") or time.monotonic() > end:
            return state
        time.sleep(0.5)


async def load(
    port: int, pid: int, cache: Path, readers: int, seconds: float, tally: Tally
) -> None:
    """Run all readers for `seconds`."""
    shards = [path for path in (cache / "arrays.zarr" / "residual").rglob("*") if path.is_file()]
    shards = [path for path in shards if path.stat().st_size > RANGE_BYTES]
    digests = {path: path.read_bytes() for path in shards}
    end = time.monotonic() + seconds
    tasks = [
        read_ranges(port, number, cache, digests, end, tally)
        if number % 2
        else read_catalogue(port, number, cache.name, end, tally)
        for number in range(readers)
    ]
    await asyncio.gather(watch_memory(pid, end, tally), *tasks)


async def read_ranges(
    port: int, seed: int, cache: Path, files: dict[Path, bytes], end: float, tally: Tally
) -> None:
    """Fetch random ranges and compare them with the files."""
    draw, connection = random.Random(seed), Connection(port)
    while time.monotonic() < end:
        path, content = draw.choice(list(files.items()))
        start = draw.randrange(len(content) - RANGE_BYTES)
        name = path.relative_to(cache.parent).as_posix()
        extra = f"Range: bytes={start}-{start + RANGE_BYTES - 1}\r\n"
        body = await timed(connection, f"/caches/{name}", extra, 206, "range", tally)
        expected = hashlib.sha256(content[start : start + RANGE_BYTES]).digest()
        if body is not None and hashlib.sha256(body).digest() != expected:
            tally.errors.append(f"{name}: bytes {start} and after are not those of the file")
        await asyncio.sleep(draw.random() * 0.1)
    connection.close()


async def read_catalogue(port: int, seed: int, cache: str, end: float, tally: Tally) -> None:
    """Ask for what the dashboard asks for."""
    draw, connection = random.Random(seed), Connection(port)
    paths = ("/v1/caches", f"/v1/caches/{cache}", f"/v1/caches/{cache}/parts", "/v1/probes")
    while time.monotonic() < end:
        body = await timed(connection, draw.choice(paths), "", 200, "catalogue", tally)
        if body is not None and not isinstance(json.loads(body), dict):
            tally.errors.append("the catalogue is no object")
        await asyncio.sleep(draw.random() * 0.5)
    connection.close()


async def timed(
    connection: Connection, path: str, extra: str, expected: int, kind: str, tally: Tally
) -> bytes | None:
    """The body of an answer, counted; None for an error, which is noted."""
    began = time.monotonic()
    try:
        status, body = await connection.get(path, extra)
    except (OSError, asyncio.IncompleteReadError) as error:
        tally.errors.append(f"{path}: {type(error).__name__} {error}")
        return None
    tally.seconds.setdefault(kind, []).append(time.monotonic() - began)
    tally.bytes += len(body)
    if status != expected:
        tally.errors.append(f"{path}: {status} {body[:200]!r}")
        return None
    return body


async def watch_memory(pid: int, end: float, tally: Tally) -> None:
    """Note the resident memory of the server once a second."""
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        tally.memory.append(int(found[1]) << 10)
        await asyncio.sleep(1)


async def drain(port: int, server: "subprocess.Popen[str]", cache: Path) -> bool:
    """Whether a shard that is being read when SIGTERM comes is still given whole."""
    path = max(
        (p for p in (cache / "arrays.zarr" / "residual").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    name = path.relative_to(cache.parent).as_posix()
    writer.write(f"GET /caches/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    server.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    body = await reader.read(path.stat().st_size + 1)
    while len(body) < path.stat().st_size and (more := await reader.read(1 << 20)):
        body += more
    writer.close()
    code = await asyncio.to_thread(server.wait, 60)
    return b" 200 " in head and body == path.read_bytes() and code in (0, -signal.SIGTERM)


if __name__ == "__main__":
    main()
