"""How answers leave: as one JSON body, or as server-sent events made while they are sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from skippy.server.errors import ClientGone, as_api_error
from skippy.server.limits import until_disconnect

DONE = b"data: [DONE]\n\n"


def json_response(message: object, status: int = 200) -> Response:
    """A msgspec struct, or anything else that it encodes, as the whole answer."""
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def event(message: msgspec.Struct) -> bytes:
    """One event that carries a message as JSON."""
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


class EventStream(Response):
    """Sends events as they come and closes their generator at once when the client leaves.

    The status waits for the first event: a failure before it is an ordinary error
    response, a later one an error event after which the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # X-Accel-Buffering asks nginx to pass events on at once.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            data = await anext(events, b"")
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                while data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    data = await anext(events, b"")
            except Exception as error:
                data = b"data: " + as_api_error(error).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": False})
