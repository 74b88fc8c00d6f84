"""S3 servers on the loopback interface for tests: moto in every run, Ceph and Swift if installed.

`serving(name)` starts this file as a script, `servers.py moto|radosgw|swift`, in its own process.
The script starts the server, prints one JSON line when the server answers, and ends with its
standard input, so that no server outlives its test.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

HOST = "127.0.0.1"
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Server:
    """A running server: endpoint, an existing bucket, two users."""

    endpoint: str
    key: str = "residua:tester"
    secret: str = "testing"
    reader: tuple[str, str] = ("residua:reader", "reading")
    """Key and secret of a user without the right to write."""
    bucket: str = "residua"
    atomic: bool = True
    """Whether exactly one of two simultaneous conditional creations of a key is accepted."""

    def as_reader(self) -> "Server":
        """The same server, used by the user without the right to write."""
        key, secret = self.reader
        return replace(self, key=key, secret=secret)

    def environment(self) -> dict[str, str]:
        """Environment variables that make S3 clients use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, **config: Any) -> Any:
        """A botocore client without retries, to see every answer; `config` is botocore's."""
        import botocore.session
        from botocore.config import Config

        defaults: dict[str, Any] = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"total_max_attempts": 1},
            "s3": {"addressing_style": "path"},
        }
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            config=Config(**{**defaults, **config}),
        )


def reason_unavailable(name: str) -> str:
    """Reason why the server `name` cannot run on this machine; empty if it can."""
    if name == "moto":
        return ""
    from importlib import import_module

    sys.path.insert(0, str(TESTS))
    try:
        return import_module(name).reason_unavailable()
    finally:
        sys.path.remove(str(TESTS))


@contextlib.contextmanager
def serving(name: str, seconds: float = 120) -> Iterator[Server]:
    """Context with a server in its own process, which ends with the block or with this process.

    Raises RuntimeError with the server's output if the server does not answer within `seconds`.
    """
    with tempfile.TemporaryFile("w+") as error_log:
        process = subprocess.Popen(
            [sys.executable, __file__, name, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=error_log,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        try:
            line = process.stdout.readline()
            if not line:
                error_log.seek(0)
                raise RuntimeError(f"the server {name} did not start: {error_log.read()[-4000:]}")
            fields = json.loads(line)
            yield Server(**{**fields, "reader": tuple(fields["reader"])})
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def free_ports(count: int) -> list[int]:
    """`count` different unused ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unbound in sockets:
            unbound.bind((HOST, 0))
        return [bound.getsockname()[1] for bound in sockets]


@contextlib.contextmanager
def running(
    commands: Sequence[Sequence[object]], folder: Path, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Context in which `commands` run, with their output in `folder`; killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"{number}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        cwd=folder,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()


def logs(folder: Path) -> str:
    """The ends of the output of all processes of `running`."""
    return "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.log"))


def wait_until(condition: Callable[[], bool], seconds: float, folder: Path) -> None:
    """Wait until `condition()`; raises RuntimeError with the logs in `folder` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"nothing after {seconds:.0f} s\n{logs(folder)}")
        time.sleep(0.1)


def is_answering(url: str) -> bool:
    """Return whether an HTTP server answers at `url`, with any status."""
    try:
        urlopen(url, timeout=5).close()
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True


def make_bucket(server: Server, seconds: float, folder: Path) -> Server:
    """Wait for the server, create its bucket, and return the server."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()

    def create_bucket() -> bool:
        """Return whether the server answered; errors of the client are raised."""
        try:
            client.create_bucket(Bucket=server.bucket)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                raise
            return False
        except BotoCoreError:
            return False
        return True

    wait_until(create_bucket, seconds, folder)
    client.close()
    return server


MOTO = """
import io, os, sys, threading
from moto.server import (
    DomainDispatcherApplication, MotoRequestHandler, create_backend_app, run_simple
)

host, port = sys.argv[1:]
os.environ["MOTO_PORT"] = port
application = DomainDispatcherApplication(create_backend_app)
application.debug = True
lock = threading.Lock()

def one_at_a_time(environ, start_response):
    size = None if environ.get("wsgi.input_terminated") else int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read() if size is None else environ["wsgi.input"].read(size)
    if size is not None and len(body) < size:  # the client has gone
        start_response("400 Bad Request", [])
        return []
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
    with lock:
        return list(application(environ, start_response))

run_simple(host, int(port), one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
"""
"""Program of the mock. It answers requests one after the other: two conditional creations in two
threads could both find no object."""


@contextlib.contextmanager
def moto(folder: Path, seconds: float) -> Iterator[Server]:
    """The mock of PyPI `moto[server]`: real HTTP, real signatures, objects in memory."""
    (port,) = free_ports(1)
    url = f"http://{HOST}:{port}"
    with running([(sys.executable, "-c", MOTO, HOST, port)], folder):
        wait_until(lambda: is_answering(url), seconds, folder)
        owner, reader = _moto_user(url, "owner", "s3:*"), _moto_user(url, "reader", "s3:[GL]*")
        # From now on the mock checks signatures and rights, which is off by default.
        headers = {"Content-Type": "text/plain"}
        urlopen(Request(f"{url}/moto-api/reset-auth", b"0", headers, method="POST")).close()
        yield make_bucket(Server(url, *owner, reader=reader), seconds, folder)


def _moto_user(url: str, name: str, action: str) -> tuple[str, str]:
    """Key and secret of a new user that may do `action`."""
    import botocore.session

    statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam = botocore.session.Session().create_client(
        "iam",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]


def main(name: str, seconds: str = "120") -> None:
    """Run server `name` until standard input ends or a signal comes."""
    from importlib import import_module

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    serve = moto if name == "moto" else import_module(name).serve
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    try:
        with serve(folder, float(seconds)) as server:
            print(json.dumps(asdict(server)), flush=True)
            sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
