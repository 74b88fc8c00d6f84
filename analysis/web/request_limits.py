"""Limits that keep a slow or dead client from holding the service: of bodies and of answers.

The time for the head of a request is limited below, in `service_protocol.py`.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .json_responses import ServiceError, error_response
from .service_settings import ServiceSettings


class RequestLimits:
    """Middleware: a piece of a body comes, and a piece of an answer is taken, in limited time."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun, body_ended = False, False

        async def receive_in_time() -> Message:
            nonlocal body_ended
            if body_ended:  # waits for the end of the connection, as long as the answer takes
                return await receive()
            try:
                async with asyncio.timeout(self.settings.body_seconds):
                    message = await receive()
            except TimeoutError:
                raise ServiceError(
                    408, "slow_body", "the body of the request came too slowly"
                ) from None
            body_ended = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            async with asyncio.timeout(self.settings.send_seconds):
                await send(message)

        try:
            await self.app(scope, receive_in_time, send_in_time)
        except ServiceError as error:
            if not has_begun:
                await error_response(error)(scope, receive, send)
        except TimeoutError:
            if not has_begun:
                raise
            # The reader stands still: the connection is cut, as part of the answer was sent.
            raise ConnectionAbortedError("the client took no more of the answer") from None
