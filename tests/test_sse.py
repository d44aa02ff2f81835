"""Event streams: what is sent, when the status is decided, and when the generator ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from skippy.engine import EngineDead
from skippy.server.schemas import ModelList
from skippy.server.sse import DONE, EventStream, event, json_response


class Connection:
    """The two ends that ASGI gives an application; the client leaves when `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self, events: AsyncGenerator[bytes, None]) -> bytes:
        await EventStream(events)({"type": "http"}, self.receive, self.send)
        return b"".join(message.get("body", b"") for message in self.sent)


def test_messages_are_single_events() -> None:
    assert event(ModelList([])) == b'data: {"data":[],"object":"list"}\n\n'
    answer = json_response({"a": 1}, 503)
    assert (answer.status_code, answer.body, answer.media_type) == (503, b'{"a":1}', "application/json")


def test_events_are_sent_as_they_come() -> None:
    async def test() -> None:
        connection = Connection()

        async def events() -> AsyncGenerator[bytes, None]:
            yield b"one"
            assert connection.sent[-1]["body"] == b"one"
            yield DONE

        assert await connection.run(events()) == b"one" + DONE
        assert connection.sent[0]["status"] == 200
        headers = dict(connection.sent[0]["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert b"content-length" not in headers
        assert connection.sent[-1]["more_body"] is False

    asyncio.run(test())


def test_a_failure_before_the_first_event_is_not_a_stream() -> None:
    async def test() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            raise EngineDead("gone")
            yield b""

        connection = Connection()
        with pytest.raises(EngineDead):
            await connection.run(events())
        assert connection.sent == []

    asyncio.run(test())


@pytest.mark.parametrize(("error", "shown"), [(EngineDead("gone"), "gone"), (ZeroDivisionError("x"), "unexpectedly")])
def test_a_later_failure_is_the_last_event(error: Exception, shown: str) -> None:
    async def test() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield b"data: 1\n\n"
            raise error

        connection = Connection()
        _, last, rest = (await connection.run(events())).split(b"\n\n")
        assert shown in json.loads(last.removeprefix(b"data: "))["error"]["message"]
        assert rest == b""
        assert connection.sent[-1]["more_body"] is False

    asyncio.run(test())


@pytest.mark.parametrize("after", [0, 1])
def test_the_generator_is_closed_when_the_client_leaves(after: int) -> None:
    async def test() -> None:
        connection, ended = Connection(), []

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                for _ in range(after):
                    yield b"data: 1\n\n"
                connection.gone.set()
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        await connection.run(events())
        assert ended == [True]
        assert len(connection.sent) == (0 if after == 0 else 2)

    asyncio.run(test())
