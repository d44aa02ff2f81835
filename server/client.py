"""The server's end of the engine process: starts it, talks to it, notices when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

import msgspec

from skippy.engine import EngineConfig, EngineDead, EngineInfo, Request, SequenceOutput, StepStats
from skippy.engine.messages import (
    Abort,
    Add,
    Command,
    Event,
    Fatal,
    FrameReader,
    Loading,
    Ready,
    Start,
    Stepped,
    encode,
)

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "skippy.engine.worker")
"""The engine process; the numbers of the descriptors to read from and to write to are appended."""

STOP_SECONDS = 10.0
"""How long a loaded engine may take to end after its command pipe was closed."""
LAST_WORDS_SECONDS = 1.0
"""How long the exit status may come after the end of the event pipe, or the other way round."""


class Generation:
    """The outputs of some requests, merged in the order they arrive.

    Iterate it inside its `with` block: whatever the consumer has not seen to the end when
    the block is left, for whatever reason, is aborted in the engine.
    """

    def __init__(self, client: AsyncEngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._requests = {request.request_id: request for request in requests}
        self._running = {request.request_id: set(range(request.n)) for request in requests}
        """Choices that the engine still works on and the consumer wants to hear of."""
        self._inbox: asyncio.Queue[SequenceOutput | None] = asyncio.Queue()

    def __enter__(self) -> Self:
        self._client.check_alive()
        for request_id, request in self._requests.items():
            self._client.register(request_id, self._inbox)
            self._client.send(Add(request))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for request_id in self._requests:
            self._abort(request_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The next output of a choice that is still wanted.

        Raises:
            EngineDead: the engine ended before the last output.
        """
        while any(self._running.values()):
            output = await self._inbox.get()
            if output is None:
                raise EngineDead(self._client.dead)
            running = self._running[output.request_id]
            wanted = output.index in running
            if output.finish_reason == "error":
                self._abort(output.request_id)  # the whole request, whichever choice it struck
            elif output.finish_reason is not None:
                running.discard(output.index)
                if not running:
                    self._client.unregister(output.request_id)
            if wanted:
                return output
        raise StopAsyncIteration

    def drop(self, request_id: str, index: int) -> None:
        """Abort a choice that still runs, and ignore what is on its way of it."""
        running = self._running[request_id]
        if running == {index}:
            self._abort(request_id)
        elif index in running:
            running.discard(index)
            self._client.send(Abort(request_id, index))

    def _abort(self, request_id: str) -> None:
        self._client.unregister(request_id)
        if self._running[request_id]:
            self._running[request_id].clear()
            self._client.send(Abort(request_id))


class AsyncEngineClient:
    """One engine process, for its whole life. Use `start` to get one and `close` to end it.

    Attributes:
        info: what was loaded; None before the engine is ready.
        loaded: the share of the model that is read, from 0 to 1; None before its size is known.
        dead: why no request can be served any more; None while the engine lives.
        on_step: called with the stats of every step, in order, and with empty ones once the engine is gone; must not
            block.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.info: EngineInfo | None = None
        self.loaded: float | None = None
        self.dead: str | None = None
        self.on_step: Callable[[StepStats], object] = _ignore
        self._process = process
        self._closing = False
        self._settled = asyncio.Event()
        self._inboxes: dict[str, asyncio.Queue[SequenceOutput | None]] = {}
        self._frames = FrameReader(Event)
        self._command_pipe = _Pipe(_ignore)
        self._event_pipe = _Pipe(self._receive)
        self._commands: asyncio.WriteTransport
        self._events: asyncio.ReadTransport
        self._supervisor: asyncio.Task[None]

    @classmethod
    async def start(
        cls, config: EngineConfig, command: Sequence[str] = WORKER_COMMAND, log_level: str = "info"
    ) -> Self:
        """Start the process and let it load; `ready` tells when it has.

        Raises:
            OSError: the process cannot be started.
        """
        command_read, command_write = os.pipe()
        event_read, event_write = os.pipe()
        try:
            # A session of its own, so that Ctrl-C reaches only the server, which then
            # finishes what is in flight. Descriptor 2: standard output stays the server's.
            process = await asyncio.create_subprocess_exec(
                *command,
                str(command_read),
                str(event_write),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                pass_fds=(command_read, event_write),
                start_new_session=True,
            )
        except BaseException:
            os.close(command_write)
            os.close(event_read)
            raise
        finally:
            os.close(command_read)
            os.close(event_write)
        client = cls(process)
        await client._connect(command_write, event_read)
        client.send(Start(config, log_level))
        return client

    async def _connect(self, command_write: int, event_read: int) -> None:
        loop = asyncio.get_running_loop()
        commands, events = os.fdopen(command_write, "wb", 0), os.fdopen(event_read, "rb", 0)
        self._commands, _ = await loop.connect_write_pipe(lambda: self._command_pipe, commands)
        self._events, _ = await loop.connect_read_pipe(lambda: self._event_pipe, events)
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> EngineInfo:
        """Wait until the engine is loaded.

        Raises:
            EngineDead: it never will be, or it has died since.
        """
        await self._settled.wait()
        self.check_alive()
        assert self.info is not None
        return self.info

    def generate(self, *requests: Request) -> Generation:
        """Run requests; nothing is sent before the `with` block of the result is entered."""
        return Generation(self, requests)

    async def close(self) -> None:
        """End the process and release everything. Waiters hear that the server stops."""
        self.give_up("The server is shutting down.")
        self._commands.close()
        if self._process.returncode is None and self.info is None:
            self._signal(signal.SIGTERM)  # while it loads, it does not watch its commands
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.shield(self._supervisor)
        except TimeoutError:
            logger.warning("The engine process did not end by itself; killing it.")
            self._signal(signal.SIGKILL)
            await self._supervisor

    def give_up(self, reason: str) -> None:
        """Tell every waiter, present and future, that nothing is served any more."""
        self._closing = True
        self._die(reason)

    def check_alive(self) -> None:
        """Raises EngineDead if the engine is."""
        if self.dead is not None:
            raise EngineDead(self.dead)

    def register(self, request_id: str, inbox: asyncio.Queue[SequenceOutput | None]) -> None:
        """Deliver a request's outputs to `inbox`, and None there if the engine dies."""
        self._inboxes[request_id] = inbox

    def unregister(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def send(self, command: Command) -> None:
        """Pass a command on without waiting; a dead engine gets none."""
        if self.dead is not None:
            return
        # It may be dead before the supervisor knows, who then tells all that wait. That is how uvloop says that the
        # pipe is broken.
        with suppress(RuntimeError):
            self._commands.write(encode(command))

    def _receive(self, data: bytes) -> None:
        try:
            for event in self._frames.feed(data):
                self._handle(cast(Event, event))
        except msgspec.MsgspecError as error:
            self._die(f"The engine process sent what is no message: {error}")
            self._signal(signal.SIGKILL)

    def _handle(self, event: Event) -> None:
        match event:
            case Stepped(output):
                for sequence in output.outputs:
                    inbox = self._inboxes.get(sequence.request_id)
                    if inbox is not None:
                        inbox.put_nowait(sequence)
                self.on_step(output.stats)
            case Loading(done, total):
                self.loaded = done / max(1, total)
            case Ready(info):
                self.info = info
                self._settled.set()
            case Fatal(message):
                self._die(message)

    async def _supervise(self) -> None:
        """Wait for the end of the process, whichever of its signs comes first, and reap it."""
        ended = asyncio.create_task(self._event_pipe.closed.wait())
        exited = asyncio.create_task(self._process.wait())
        await asyncio.wait({ended, exited}, return_when=asyncio.FIRST_COMPLETED)
        # The other sign follows at once, unless the process hangs without its pipe or
        # left a child that holds it.
        await asyncio.wait({ended, exited}, timeout=LAST_WORDS_SECONDS)
        if not exited.done():
            self._signal(signal.SIGKILL)
        code = await exited
        self._die(f"The engine process ended {_describe_exit(code)}.")
        self._events.close()
        self._commands.close()
        await ended
        await self._command_pipe.closed.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _die(self, reason: str) -> None:
        if self.dead is not None:
            return
        self.dead = reason
        if self.info is not None and not self._closing:
            logger.error("The engine is gone: %s", reason)
        self._settled.set()
        self.on_step(StepStats())  # nothing runs or waits any more
        for inbox in set(self._inboxes.values()):
            inbox.put_nowait(None)


def _ignore(_: object) -> None:
    pass


class _Pipe(asyncio.Protocol):
    """One end of a pipe: passes on what arrives and tells when it is closed."""

    def __init__(self, receive: Callable[[bytes], object]) -> None:
        self.closed = asyncio.Event()
        self._receive = receive

    def data_received(self, data: bytes) -> None:
        self._receive(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self.closed.set()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"with status {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"
