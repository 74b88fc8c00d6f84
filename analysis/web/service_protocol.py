"""HTTP connections with limits on the head of a request, which uvicorn's own lack."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 << 10
"""Largest head of a request: its line and headers, in bytes."""


def limited_protocol(head_seconds: float) -> type[HttpToolsProtocol]:
    """Class of connections that are closed where a head takes longer than `head_seconds`.

    A head of more than `MAX_HEAD_BYTES` is answered with 431. Between two requests uvicorn's
    `timeout_keep_alive` counts.
    """

    class LimitedConnection(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _in_head = True
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
                self._end_head()
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                    b"connection: close\r\ncontent-length: 0\r\n\r\n"
                )
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _begin_head(self) -> None:
            self._in_head, self._head_bytes = True, 0
            if self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._close_slow)

        def _end_head(self) -> None:
            self._in_head = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_slow(self) -> None:
            self._timer = None
            if self._in_head and not self.transport.is_closing():
                self.transport.close()

    return LimitedConnection
