"""The engine process seen from the server, with a scripted engine in its place."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import uvloop

from skippy.engine import EngineConfig, EngineDead, Request, SamplingParams, StepStats
from skippy.engine.messages import Abort
from skippy.server import client as client_module
from skippy.server.client import AsyncEngineClient

STUB = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))


@asynccontextmanager
async def engine(*options: str) -> AsyncIterator[AsyncEngineClient]:
    client = await AsyncEngineClient.start(EngineConfig(), (*STUB, *options))
    try:
        yield client
    finally:
        await client.close()


def request(name: str = "r", n: int = 1, max_tokens: int = 3, width: int | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, (5, 6, 7), params, n=n, num_speculative_tokens=width)


async def collect(client: AsyncEngineClient, *requests: Request) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    with client.generate(*requests) as generation:
        async for output in generation:
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


async def stats_where(client: AsyncEngineClient, wanted: Callable[[StepStats], bool]) -> StepStats:
    """The stats of the first step from now on that satisfy the condition."""
    found: asyncio.Future[StepStats] = asyncio.get_running_loop().create_future()

    def look(stats: StepStats) -> None:
        if wanted(stats) and not found.done():
            found.set_result(stats)

    client.on_step = look
    async with asyncio.timeout(10):
        return await found


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    uvloop.run(limited())


def test_requests_and_choices_are_merged_into_one_stream() -> None:
    async def test() -> None:
        async with engine() as client:
            info = await client.ready()
            assert info.drafters == ["none", "ngram"]
            tokens = await collect(client, request("a", n=2), request("b", max_tokens=5, width=3))
            assert tokens == {("a", 0): [5, 6, 7], ("a", 1): [5, 6, 7], ("b", 0): [5, 6, 7, 5, 6]}

    run(test)


def test_leaving_the_block_aborts_what_still_runs() -> None:
    async def test() -> None:
        async with engine("--step-seconds", "0.005") as client:
            await client.ready()
            with client.generate(request(max_tokens=10_000)) as generation:
                await anext(generation)
            await stats_where(client, lambda stats: stats.running == 0)
            task = asyncio.create_task(collect(client, request("b", max_tokens=10_000)))
            await stats_where(client, lambda stats: stats.running == 1)
            task.cancel()
            await stats_where(client, lambda stats: stats.running == 0)
            with pytest.raises(asyncio.CancelledError):
                await task

    run(test)


def test_a_dropped_choice_is_aborted_alone() -> None:
    async def test() -> None:
        async with engine("--step-seconds", "0.005") as client:
            await client.ready()
            with client.generate(request(n=2, max_tokens=10_000), request("b", max_tokens=10_000)) as generation:
                await anext(generation)
                generation.drop("r", 0)
                assert (await stats_where(client, lambda stats: stats.running == 2)).kv_blocks_used == 2
                assert {(await anext(generation)).request_id for _ in range(4)} == {"r", "b"}
                generation.drop("r", 1)
                assert (await stats_where(client, lambda stats: stats.running == 1)).kv_blocks_used == 1
                assert {(await anext(generation)).request_id for _ in range(4)} == {"b"}

    run(test)


def test_an_error_ends_every_choice_of_its_request() -> None:
    async def test() -> None:
        async with engine("--fail-at-step", "2") as client:
            await client.ready()
            with client.generate(request(n=2, max_tokens=10_000)) as generation:
                outputs = [output async for output in generation]
            assert outputs[-1].error == "stub"
            await collect(client, request("next"))
            assert client.dead is None

    run(test)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--fatal", "no such folder"), "no such folder"),
        (("--garbage",), "no message"),
        (("--no-such-option",), "status 2"),
    ],
)
def test_a_failed_start_reaches_whoever_waits(options: tuple[str, ...], reason: str) -> None:
    async def test() -> None:
        async with engine(*options) as client:
            waiting = asyncio.gather(client.ready(), client.ready(), return_exceptions=True)
            for error in await waiting:
                assert isinstance(error, EngineDead)
                assert reason in str(error)
            with pytest.raises(EngineDead, match=reason):
                await client.ready()

    run(test)


def test_a_command_that_does_not_exist_is_an_error_and_leaks_nothing() -> None:
    async def test() -> None:
        before = psutil.Process().num_fds()
        with pytest.raises(FileNotFoundError):
            await AsyncEngineClient.start(EngineConfig(), ("/no/such/command",))
        assert psutil.Process().num_fds() == before

    run(test)


def test_every_waiter_present_and_future_hears_that_the_engine_died() -> None:
    async def test() -> None:
        async with engine("--step-seconds", "0.005") as client:
            await client.ready()
            waiting = [asyncio.create_task(collect(client, request(str(i), max_tokens=10_000))) for i in range(3)]
            await stats_where(client, lambda stats: stats.running == 3)
            os.kill(client.pid, signal.SIGKILL)
            for error in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(error, EngineDead)
                assert "SIGKILL" in str(error)
            with pytest.raises(EngineDead, match="SIGKILL"):
                await collect(client, request())
            with pytest.raises(EngineDead, match="SIGKILL"):
                await client.ready()

    run(test)


def test_whoever_comes_before_it_is_known_that_the_engine_died_hears_of_it_too() -> None:
    async def test() -> None:
        async with engine() as client:
            await client.ready()
            os.kill(client.pid, signal.SIGKILL)
            os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)  # while the event loop stands still
            assert client.dead is None
            client.send(Abort("a"))
            await asyncio.sleep(0)  # now the pipe is known to be broken, and nothing else
            with client.generate(request("a"), request("b")) as generation, pytest.raises(EngineDead, match="SIGKILL"):
                await anext(generation)

    run(test)


@pytest.mark.parametrize("options", [(), ("--load-seconds", "30"), ("--fatal", "x"), ("--deaf",)])
def test_closing_leaves_nothing_behind(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "STOP_SECONDS", 0.5)

    async def test() -> None:
        async with engine():
            pass  # the event loop keeps a descriptor from its first process on
        process, tasks, threads = psutil.Process(), asyncio.all_tasks(), threading.active_count()
        before = process.num_fds()
        async with engine(*options) as client:
            if "--load-seconds" not in options and "--fatal" not in options:
                await client.ready()
            waiter = asyncio.create_task(client.ready())
        assert not psutil.pid_exists(client.pid)
        assert process.num_fds() == before
        assert asyncio.all_tasks() - {waiter} == tasks
        assert threading.active_count() == threads
        await asyncio.gather(waiter, return_exceptions=True)
        with pytest.raises(EngineDead):
            await client.ready()

    run(test)
