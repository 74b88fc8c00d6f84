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
from residua.analysis.web.service_settings import make_settings
from residua.cache.errors import UsageError
from residua.cache.files.paths import as_path

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
        running_service(root, jobs=True, allowed_hosts=(NAME,)) as server,
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
        assert client.get(f"/v1/jobs/{job['id']}").json()["value"]["ok"] is True


@needs_nginx
def test_nginx_sends_committed_shards_and_the_service_the_rest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.analysis.service.byte_routes import ByteResponse

    sent_here: list[int] = []
    respond = ByteResponse.__call__

    async def count(self: ByteResponse, *arguments: Any) -> None:
        sent_here.append(1)
        await respond(self, *arguments)

    monkeypatch.setattr(ByteResponse, "__call__", count)
    folder = tmp_path / "nginx"
    folder.mkdir()
    (cache,) = root.glob("[0-9a-f]*")
    shard = "arrays.zarr/residual/1/c/1/0"
    content = (cache / shard).read_bytes()
    with (
        running_service(
            root, allowed_hosts=(NAME,), allowed_origins=("*",), accel="/_files/"
        ) as server,
        running_nginx(folder, root, server) as client,
    ):
        url = f"/caches/{cache.name}/{shard}"
        whole = client.get(url)
        assert whole.content == content
        assert "immutable" in whole.headers["cache-control"]
        assert whole.headers["access-control-allow-origin"] == client.headers["origin"]
        for text, span in (("bytes=5-99", slice(5, 100)), ("bytes=-16", slice(-16, None))):
            part = client.get(url, headers={"Range": text})
            assert (part.status_code, part.content) == (206, content[span])
        several = client.get(url, headers={"Range": "bytes=0-3,8-11"})
        assert several.headers["content-type"].startswith("multipart/byteranges")
        assert client.get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416
        assert client.head(url).headers["content-length"] == str(len(content))
        assert sent_here == []
        # The tag is that of the service, which answers what depends on it.
        tag = whole.headers["etag"]
        assert tag == httpx.get(server.address + url, headers={"If-Match": "*"}).headers["etag"]
        assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
        part = client.get(url, headers={"If-Match": tag, "Range": "bytes=0-3"})
        assert part.content == content[:4]
        assert client.get(url, headers={"If-Match": '"other"'}).status_code == 412
        assert client.get(f"/caches/{cache.name}/manifest.json").status_code == 200
        assert len(sent_here) == 3
        # What is not served is not given by the proxy either, nor its own folder.
        for path in ("/_files/", f"/_files/{cache.name}/{shard}", "/caches/../nginx/key.pem"):
            assert client.get(path).status_code == 404


def test_a_wrong_prefix_is_refused(tmp_path: Path) -> None:
    for prefix in ("_files/", "/_files", "/", "/a b/", "//x/"):
        with pytest.raises(UsageError, match="slash at both ends"):
            make_settings(tmp_path, tmp_path, accel=prefix)
    with pytest.raises(UsageError, match="on a disk"):
        make_settings(as_path("memory://caches"), tmp_path, accel="/_files/")


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

    pattern = r"(?:^residua|residua/bin/residua|run .* residua) (.*)"
    lines = re.findall(pattern, PAGE.replace("\\\n", ""), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        command, *words = line.split()
        known = {option for p in main.commands[command].params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
