"""Body sizes, the length of the queue, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import stub_worker

from skippy.engine import InvalidRequest, Tokenizer
from skippy.server.errors import ApiError, ClientGone
from skippy.server.limits import MAX_BODY_BYTES, Admission, until_disconnect
from skippy.server.models import ServedModel
from skippy.server.requests import prepare
from skippy.server.schemas import CompletionRequest

if TYPE_CHECKING:
    from conftest import LiveServer, ServerFactory


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_long(server: LiveServer, announced: bool) -> None:
    size = MAX_BODY_BYTES + 1

    def chunks() -> Iterator[bytes]:
        for start in range(0, size, 65536):
            yield b" " * min(65536, size - start)

    content: Any = b" " * size if announced else chunks()
    # The server answers without reading on; the client may notice that while it still sends.
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        answer = httpx.post(f"{server.url}/v1/completions", content=content)
        assert answer.status_code == 413
        assert str(MAX_BODY_BYTES) in answer.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_client_that_leaves_within_its_body_is_no_failure(
    server_with: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with server_with() as server:
        server.wait_until_loaded()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert httpx.get(f"{server.url}/health").status_code == 200  # the request has been read by then
    assert "ERROR" not in caplog.text


def test_admission_has_room_for_the_running_and_the_waiting() -> None:
    admission = Admission(max_waiting=2)
    with admission.admit(4, max_running=4):
        with admission.admit(2, max_running=4), pytest.raises(ApiError) as caught, admission.admit(1, max_running=4):
            pass
        assert caught.value.status == 429
        with admission.admit(2, max_running=4):
            pass
    with contextlib.suppress(ZeroDivisionError), admission.admit(6, max_running=4):
        raise ZeroDivisionError
    with admission.admit(6, max_running=4):
        pass


@pytest.mark.parametrize(("prompts", "n", "param"), [(7, 1, "prompt"), (7, 7, "prompt"), (2, 4, "n"), (1, 7, "n")])
def test_what_never_fits_is_refused_for_what_is_too_many(prompts: int, n: int, param: str) -> None:
    admission = Admission(max_waiting=2)
    admission.check_size(3, 2, max_running=4)
    with pytest.raises(InvalidRequest) as caught:
        admission.check_size(prompts, n, max_running=4)
    assert caught.value.param == param


def test_a_crowd_of_prompts_is_refused_before_any_is_read(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(_: Tokenizer, text: str) -> list[int]:
        read.append(text)
        return [5]

    read: list[str] = []
    monkeypatch.setattr(Tokenizer, "encode", encode)  # the server is a thread of this process
    url = f"{server.url}/v1/completions"
    for prompt, n, param in ((["a"] * 10**5, 1, "prompt"), (["a"] * 1000, 128, "n")):
        answer = httpx.post(url, json={"prompt": prompt, "n": n}, timeout=30)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    assert read == []
    assert httpx.post(url, json={"prompt": ["a", "b"]}).status_code == 200
    assert read == ["a", "b"]


def test_others_get_their_turn_between_two_prompts() -> None:
    async def test() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        model = ServedModel("m", 0, stub_worker.info(), Tokenizer.load(stub_worker.BUILTIN))
        prepared = await prepare(CompletionRequest(prompt=["a"] * 100), model, "c")
        task.cancel()
        assert [prompt.request.request_id for prompt in prepared] == [f"c-{i}" for i in range(100)]
        assert turns >= 100

    asyncio.run(test())


class Receive:
    """An ASGI receive whose client leaves when `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.calls = 0

    async def __call__(self) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


def test_work_ends_with_its_result_its_error_or_its_client() -> None:
    async def test() -> None:
        receive = Receive()
        assert await until_disconnect(receive, asyncio.sleep(0, "done")) == "done"

        async def fail() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await until_disconnect(receive, fail())

        ended = []

        async def work() -> None:
            receive.gone.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(True)

        with pytest.raises(ClientGone):
            await until_disconnect(receive, work())
        assert ended, "the work has ended, not only been told to"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(test())


def test_a_cancelled_wait_cancels_the_work() -> None:
    async def test() -> None:
        started, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        waiting = asyncio.create_task(until_disconnect(Receive(), work()))
        await started.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended.is_set()

    asyncio.run(test())
