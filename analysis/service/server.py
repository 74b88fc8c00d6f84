"""Starts and stops a service: the socket, uvicorn, the signals, what the terminal shows."""

import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from ...cache.errors import UsageError
from ..jobs.job_queue import JobQueue
from ..jobs.job_settings import JobSettings
from ..served_files.freed_memory import keep_freed_memory
from ..web.access_control import is_loopback
from ..web.access_tokens import has_tokens, load_tokens
from ..web.request_records import ACCESS_LOGGER
from ..web.service_protocol import limited_protocol
from ..web.service_settings import ServiceSettings
from .application import Service, make_application
from .demo_jobs import demo_settings, start_demo

KEEP_ALIVE_SECONDS = 30
"""Time for which a connection without a request stays open."""
BACKLOG = 1024
LOGGER = logging.getLogger("residua.service")


def check_exposure(settings: ServiceSettings, public: bool) -> None:
    """Raise `UsageError` for a service that others can reach, and that nobody meant to be.

    Beyond this machine's own addresses, a service starts only if it is `public` and has a token
    that was chosen, or shown, before.
    """
    is_local = is_loopback(settings.host)
    if not is_local and not public:
        raise UsageError(
            f"at {settings.host} other machines reach the service: add --public if that is meant, "
            "or leave --host out"
        )
    if public and not has_tokens(settings.state):
        raise UsageError(
            "a public service needs a token: set $RESIDUA_TOKEN (such as `openssl rand -hex 32` "
            "prints), or start it once without --public, which prints one"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port`; raises `UsageError` where none can."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host!r} is no address of this machine: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port (0 takes a free one)"
        ) from None
    listener.set_inheritable(False)
    return listener


class ServiceServer(uvicorn.Server):
    """A service with its socket: it listens from the start, and answers in `serve_until_told`."""

    def __init__(
        self,
        settings: ServiceSettings,
        public: bool = False,
        started: Callable[[Service, str], None] | None = None,
        read_only: bool = False,
    ) -> None:
        """A `read_only` service takes no jobs.

        `started` is called with the service and its address once requests are answered. Raises
        `UsageError` if the service may not or cannot listen.
        """
        check_exposure(settings, public)
        tokens = load_tokens(settings.state)
        self.listener = open_socket(settings.host, settings.port)
        port = self.listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.address: str = f"http://{host}:{port}"
        settings = replace(settings, port=port)
        queue = None if read_only else make_queue(settings)
        service = Service(settings, tokens, queue)
        self.service: Service = service

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            if service.jobs is not None:
                service.metrics.count_jobs(service.jobs.count_states)
                await run_in_threadpool(service.jobs.start)
            try:
                if started is not None:
                    started(service, self.address)
                yield
            finally:
                if service.jobs is not None:
                    await run_in_threadpool(service.jobs.stop)

        config = uvicorn.Config(
            make_application(self.service, lifespan),
            http=limited_protocol(settings.header_seconds),
            loop="auto",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(settings.drain_seconds),
            backlog=BACKLOG,
        )
        super().__init__(config)

    def serve_until_told(self) -> None:
        """Answer requests until SIGINT, SIGTERM or `stop`; then end those being answered."""
        with self.listener:
            self.run(sockets=[self.listener])

    def stop(self) -> None:
        """Tell the service to stop; from any thread."""
        self.service.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.draining = True
        super().handle_exit(sig, frame)


def make_queue(settings: ServiceSettings) -> JobQueue:
    """The queue of the jobs of a service, not started."""
    return JobQueue(
        JobSettings(
            root=settings.root,
            state=settings.state,
            models=settings.models,
            texts=settings.texts,
            allow_hub=settings.hub,
            allow_remote_code=settings.remote_code,
            scheduler=settings.scheduler,
            workers=settings.workers,
        )
    )


def run_service(
    settings: ServiceSettings,
    public: bool = False,
    started: Callable[[Service, str], None] | None = None,
    demo: bool = False,
) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; returns the address and the number of answered requests.

    With `demo`, jobs of the sample model begin at once. See `ServiceServer` for arguments and
    errors.
    """
    keep_freed_memory()
    if demo:
        settings = demo_settings(settings)

    def begin(service: Service, address: str) -> None:
        if started is not None:
            started(service, address)
        if demo and service.jobs is not None:
            start_demo(service.jobs, LOGGER.info)

    server = ServiceServer(settings, public, begin)
    server.serve_until_told()
    answered = server.service.answered
    return {"address": server.address, "root": str(settings.root), "requests": answered}


def log_to_stderr(access: bool) -> None:
    """Write messages of the service, and with `access` every request, to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.disable(logging.NOTSET)
    levels = {
        LOGGER: logging.INFO,
        ACCESS_LOGGER: logging.INFO if access else logging.WARNING,
        logging.getLogger("uvicorn.error"): logging.ERROR,
    }
    for logger, level in levels.items():
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
