"""What one client may take: bytes of a body, places in the queue, and no time after it has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from skippy.engine import InvalidRequest
from skippy.server.errors import ApiError, ClientGone

MAX_BODY_BYTES = 16 * 2**20
RETRY_SECONDS = 1

T = TypeVar("T")


async def read_body(request: Request) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is longer than MAX_BODY_BYTES.
        ClientGone: the client left before its end.
    """
    length = request.headers.get("content-length", "")
    body = bytearray()
    if not length.isdecimal() or int(length) <= MAX_BODY_BYTES:
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    break
            else:
                return bytes(body)
        except ClientDisconnect as error:
            raise ClientGone from error
    # What is left of the body would be taken for the next request.
    raise ApiError(413, f"The body is longer than {MAX_BODY_BYTES} bytes.", headers={"connection": "close"})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, if the client leaves first.

    Raises:
        ClientGone: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Admission:
    """Counts the sequences inside the server, so that the queue has an end.

    Args:
        max_waiting: how many may wait behind those that the engine runs.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._inside = 0

    def check_size(self, prompts: int, n: int, max_running: int) -> None:
        """Refuse at once what no wait helps: `n` sequences for each prompt must fit into an idle server.

        Raises:
            InvalidRequest: they do not.
        """
        capacity = max_running + self._max_waiting
        if prompts * n > capacity:
            raise InvalidRequest(
                f"The request asks for {prompts * n} sequences, {n} for each prompt; this server takes {capacity}"
                " at a time.",
                "prompt" if prompts > capacity else "n",
            )

    @contextmanager
    def admit(self, sequences: int, max_running: int) -> Iterator[None]:
        """Hold places for the sequences of one request; the engine runs `max_running` at a time.

        Raises:
            ApiError: 429, they do not fit now.
        """
        if self._inside + sequences > max_running + self._max_waiting:
            raise ApiError(
                429,
                "Too many requests are waiting; try again later.",
                code="queue_full",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        self._inside += sequences
        try:
            yield
        finally:
            self._inside -= sequences
