"""docs/deploy.md is true: its nginx serves the service, its unit is one, its scripts are code."""

import json
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import residua
from residua.analysis.service.server import ServiceServer

from .support.services import running_service
from .support.synthetic import make_cache, random_head

PAGE = (Path(residua.__file__ or "").parent / "docs" / "deploy.md").read_text()
NAME = "caches.example.org"


def block(language: str) -> str:
    """The only block of a language on the page."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


def write_nginx(folder: Path, root: Path, service: str, port: int) -> Path:
    """The page's nginx as a whole configuration with a certificate of its own; its file."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
        + ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True,
        capture_output=True,
    )
    site = block("nginx")
    for old, new in (
        ("127.0.0.1:8470", service.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/residua/", f"{folder}/"),
        ("/srv/caches/", f"{root}/"),
    ):
        site = site.replace(old, new)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if Path.home() == Path("/root") else ""
    file = folder / "nginx.conf"
    file.write_text(
        f"{user}daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{ worker_connections 64; }}\nhttp {{ access_log off;\n{paths}{site}\n}}\n"
    )
    return file


@contextmanager
def running_nginx(folder: Path, root: Path, service: ServiceServer) -> Iterator[httpx.Client]:
    """A client of the service by way of nginx, over TLS."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = write_nginx(folder, root, service.address, port)
    nginx = str(shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/bin"))
    process = subprocess.Popen([nginx, "-c", str(file), "-e", str(folder / "error.log")])
    try:
        context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        context.check_hostname = False  # the name is that of the page, the address the loopback's
        headers = {"Host": f"{NAME}:{port}", "Origin": f"https://{NAME}:{port}"}
        with httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=context, headers=headers, timeout=60
        ) as client:
            for _ in range(200):
                try:
                    client.get("/healthz")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, (folder / "error.log").read_text()
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(30)


needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/bin")
    or not shutil.which("openssl"),
    reason="nginx or openssl is not installed",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a cache of random rows."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(640, 8)).astype(np.float32) for _ in range(3)]
    make_cache(tmp_path / "root", layers, [40] * 16, random_head(8, 32))
    return tmp_path / "root"


@needs_nginx
def test_the_service_works_behind_the_nginx_of_the_page(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nginx"
    folder.mkdir()
    with (
        running_service(root, allowed_hosts=(NAME,)) as server,
        running_nginx(folder, root, server) as client,
    ):
        token = {"Authorization": f"Bearer {server.service.tokens.write}"}
        cache = client.get("/v1/caches").json()["caches"][0]["cache"]
        session = client.post("/v1/session", json={"token": server.service.tokens.write})
        assert "secure" in session.headers["set-cookie"].lower()
        job = client.post(
            "/v1/jobs",
            headers=token,
            json={"command": "verify", "arguments": {"cache": cache}},
        ).json()
        events = list(read_states(client, job["id"]))
        assert [state for _, state in events][-1] == "done"
        # The events came while the job ran, and not all at its end.
        assert events[-1][0] - events[0][0] > 0.2
        assert client.get(f"/v1/jobs/{job['id']}").json()["value"]["damaged"] == []


def read_states(client: httpx.Client, job: str) -> Iterator[tuple[float, str]]:
    """Time and name of each state of a job, as its event comes."""
    deadline = time.monotonic() + 120
    with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        for line in answer.iter_lines():
            assert time.monotonic() < deadline
            if line.startswith("data:"):
                value: Any = json.loads(line.removeprefix("data:"))
                if "state" in value:
                    yield time.monotonic(), value["state"]
                    if value["state"] in ("done", "failed", "cancelled"):
                        return


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "residua.service"
    unit.write_text(block("ini").replace("/opt/residua/bin/residua", sys.executable))
    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    lines = [line for line in result.stderr.splitlines() if str(unit) in line or unit.name in line]
    assert lines == []


def test_the_script_for_workers_is_code() -> None:
    (script,) = re.findall(r"<<'END'\n(.*?)\nEND\n", PAGE, re.DOTALL)
    compile(script, "workers.py", "exec")


def test_commands_on_the_page_have_options_that_exist() -> None:
    """Those within blocks: `tests/test_readme.py` looks at the indented ones."""
    from residua.cli import main

    lines = re.findall(r"(?:residua/bin/residua|run .* residua) (.*)", PAGE.replace("\\\n", ""))
    assert len(lines) >= 2
    for line in lines:
        command, *words = line.split()
        known = {option for p in main.commands[command].params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
