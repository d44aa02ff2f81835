"""The engine process: `python -m skippy.engine.worker READ_FD WRITE_FD`.

Reads commands from one pipe, writes events to another (see `messages`), and exits when the
command pipe closes. It has one thread: between two steps it takes whatever commands have
come, and only with nothing to do does it wait for one.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from skippy.engine.config import EngineConfig
from skippy.engine.engine import Engine
from skippy.engine.errors import InvalidRequest, SkippyError
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
from skippy.engine.types import DraftCounts, SequenceOutput, StepOutput

READ_BYTES = 1 << 16
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
CLIENT_LOGGERS = ("httpx", "httpx2")

logger = logging.getLogger("skippy.engine")


class _Hangup(Exception):
    """The server closed the command pipe."""


class Worker:
    """Moves commands into an engine and its steps out."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._frames = FrameReader(Command)

    def run(self) -> int:
        """Serve until the pipe closes. Returns the exit code."""
        engine: Engine | None = None
        try:
            config, early = self._await_start()
            try:
                engine = Engine(leave_a_core(config), lambda done, total: self._send(Loading(done, total)), serves=True)
            except SkippyError as error:
                self._send(Fatal(str(error)))
                return 2
            self._send(Ready(engine.info))
            for command in early:
                self._obey(engine, command)
            while True:
                told = self._take_commands(engine, wait=False)
                if not told and not engine.has_work and not engine.learn():
                    told = self._take_commands(engine, wait=True)
                if engine.has_work:
                    self._send(Stepped(engine.step()))
                elif told:
                    # The last request was aborted or refused: say that nothing runs any more.
                    self._send(Stepped(StepOutput([], engine.load())))
                else:
                    continue  # a piece was learnt
                if not engine.has_work:
                    engine.check()  # a block that is lost, or held twice, would cost exactness in the end
        except (_Hangup, BrokenPipeError):
            if engine is not None:
                engine.close()
            return 0
        except Exception as error:
            logger.exception("the engine cannot go on")
            self._send(Fatal(f"The engine failed: {type(error).__name__}: {error}"))
            return 1

    def _await_start(self) -> tuple[EngineConfig, list[Command]]:
        """The configuration, and whatever commands came along with it. From then on its log level counts."""
        while not (commands := self._read()):
            pass
        start, *early = commands
        if not isinstance(start, Start):
            raise TypeError(f"the first command is {type(start).__name__}, not Start")
        logging.getLogger().setLevel(start.log_level.upper())
        if start.log_level != "debug":  # the hub's client tells of every request, and where it was sent on to
            for name in CLIENT_LOGGERS:
                logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
        return start.config, early

    def _take_commands(self, engine: Engine, *, wait: bool) -> bool:
        """Obey what has come, and say whether anything has."""
        told = False
        while (wait and not told) or select.select([self._read_fd], [], [], 0)[0]:
            for command in self._read():
                self._obey(engine, command)
            told = True
        return told

    def _obey(self, engine: Engine, command: Command) -> None:
        if isinstance(command, Add):
            try:
                engine.add(command.request)
            except InvalidRequest as error:
                self._send(Stepped(StepOutput([_refusal(command.request.request_id, error)], engine.load())))
        elif isinstance(command, Abort):
            engine.abort(command.request_id, command.index)

    def _read(self) -> list[Command]:
        data = os.read(self._read_fd, READ_BYTES)
        if not data:
            raise _Hangup
        return self._frames.feed(data)  # type: ignore[return-value]

    def _send(self, event: Event) -> None:
        frame = memoryview(encode(event))
        while frame:
            frame = frame[os.write(self._write_fd, frame) :]


def leave_a_core(config: EngineConfig) -> EngineConfig:
    """One thread less than there are cores, if nobody said how many.

    The server needs a core as well. A parallel product waits for its slowest thread, and one
    that has to share its core with another process comes a scheduler's time slice late: it
    makes a step of 4 ms one of 300.
    """
    if config.num_threads is not None:
        return config
    return replace(config, num_threads=max(1, usable_cores() - 1))


def usable_cores() -> int:
    """Cores that this process may run on, or as many as its container may use the time of."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # there are no such limits, or none is set: "max"
        quota, period = map(int, CPU_LIMIT.read_text().split())
        return min(cores, -(-quota // period))
    return cores


def _refusal(request_id: str, error: InvalidRequest) -> SequenceOutput:
    return SequenceOutput(request_id, 0, [], DraftCounts(), "none", finish_reason="error", error=error.message)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Ctrl-C goes to the whole process group; the server closes the pipe when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Worker(int(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
