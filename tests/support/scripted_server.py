"""An HTTP server for tests that answers as a function says, byte by byte: also wrongly."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

HEAD_BYTES = 1 << 16
SECONDS = 20


@dataclass
class ScriptedServer:
    """A running server: its address, and the heads of the requests that came."""

    address: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def scripted_server(answer: Callable[[str, int], bytes]) -> Iterator[ScriptedServer]:
    """A server that sends `answer(head, number)` for the request `number`, from 0, and closes.

    The connection is closed after each answer, whatever it says. An empty answer sends nothing.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    server = ScriptedServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(SECONDS)
            head = b""
            while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
                if not (piece := connection.recv(4096)):
                    return
                head += piece
            number = len(server.requests)
            server.requests.append(head.decode("latin-1"))
            connection.sendall(answer(server.requests[-1], number))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # until the client closes, so that it gets all that was sent

    def listen() -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                connection = listener.accept()[0]
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        thread.join(SECONDS)
        listener.close()


def http_answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    """An answer with its length, unless `headers` (with `_` for `-`) has another one."""
    named = {"Content-Length": str(len(body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def range_answer(data: bytes, head: str, **headers: str) -> bytes:
    """The answer of a right server to a request for one range of `data`, or for all of it."""
    text = head.lower().partition("range: bytes=")[2].partition("\r\n")[0]
    if not text or "\r\nrange:" not in head.lower():
        return http_answer("200 OK", data, **headers)
    first, _, last = text.partition("-")
    start = int(first) if first else len(data) - int(last)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return http_answer("416 Range Not Satisfiable", Content_Range=f"bytes */{len(data)}")
    return http_answer(
        "206 Partial Content",
        data[start:stop],
        **{"Content_Range": f"bytes {start}-{stop - 1}/{len(data)}", **headers},
    )
