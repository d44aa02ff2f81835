"""The engine process over its two pipes, as the server sees it."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_engine import write_checkpoint

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
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
from skippy.engine.types import SequenceOutput
from skippy.engine.worker import Worker, usable_cores

PATIENCE = 60.0


class Process:
    """A worker and the server's ends of its pipes."""

    def __init__(self) -> None:
        commands, self.commands = os.pipe()
        self.events, events = os.pipe()
        # A small pipe: the worker cannot run ahead of its reader, and writes frames in pieces.
        fcntl.fcntl(self.events, fcntl.F_SETPIPE_SZ, 4096)
        self._frames = FrameReader(Event)
        self._received: list[Event] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skippy.engine.worker", str(commands), str(events)],
            pass_fds=(commands, events),
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.close(commands)
        os.close(events)

    def send(self, *commands: Command) -> None:
        os.write(self.commands, b"".join(map(encode, commands)))

    def receive(self) -> Event | None:
        """The next event; None once the worker has closed its end."""
        while not self._received:
            ready, _, _ = select.select([self.events], [], [], PATIENCE)
            assert ready, "the worker is silent"
            data = os.read(self.events, 1 << 16)
            if not data:
                return None
            self._received += self._frames.feed(data)  # type: ignore[arg-type]
        return self._received.pop(0)

    def ready(self) -> tuple[list[Loading], Ready]:
        """What it says while it loads, and in the end."""
        told: list[Loading] = []
        while isinstance(event := self.receive(), Loading):
            told.append(event)
        assert isinstance(event, Ready)
        return told, event

    def outputs(self) -> list[SequenceOutput]:
        event = self.receive()
        assert isinstance(event, Stepped)
        return event.output.outputs

    def until_finished(self, *request_ids: str) -> dict[str, list[SequenceOutput]]:
        """Every output of these requests (one choice each) up to their ends."""
        outputs: dict[str, list[SequenceOutput]] = {name: [] for name in request_ids}
        while not all(parts and parts[-1].finish_reason for parts in outputs.values()):
            for output in self.outputs():
                outputs[output.request_id].append(output)
        return outputs

    def hang_up(self) -> None:
        if self.commands >= 0:
            os.close(self.commands)
            self.commands = -1

    def exit_code(self) -> int:
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        self.hang_up()
        os.close(self.events)
        try:
            self.exit_code()
        finally:
            self._process.kill()
            self._process.communicate()


@contextmanager
def worker() -> Iterator[Process]:
    process = Process()
    try:
        yield process
    finally:
        process.close()


def in_process(*commands: Command) -> tuple[int, list[Command | Event]]:
    """What a worker returns and says that reads these commands and then the end, without a process of its own."""
    reads, writes = os.pipe()
    events_out, events_in = os.pipe()
    try:
        os.write(writes, b"".join(map(encode, commands)))
        os.close(writes)
        code = Worker(reads, events_in).run()
        os.close(events_in)
        return code, FrameReader(Event).feed(os.read(events_out, 1 << 16))
    finally:
        os.close(reads)
        os.close(events_out)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=8, max_num_seqs=4)


@pytest.fixture(scope="module")
def loaded(config: EngineConfig) -> Iterator[Process]:
    """A worker that serves."""
    with worker() as process:
        process.send(Start(config))
        loading, ready = process.ready()
        assert [event.done for event in loading] == sorted(event.done for event in loading)
        assert loading[-1].done == loading[-1].total == (Path(config.model) / "model.safetensors").stat().st_size
        assert ready.info.model == config.model
        assert ready.info.max_model_len == 256
        yield process


def request(name: str, max_tokens: int = 6, prompt: tuple[int, ...] = (1, 5, 9), seed: int = 1) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed))


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


class TestServing:
    def test_a_request_runs_to_its_end(self, loaded: Process) -> None:
        loaded.send(Add(request("a")))
        outputs = loaded.until_finished("a")["a"]
        assert len(tokens(outputs)) == 6
        assert outputs[-1].finish_reason == "length"
        assert all(output.finish_reason is None for output in outputs[:-1])

    def test_requests_run_beside_each_other_and_do_not_show(self, loaded: Process) -> None:
        names = [f"b{i}" for i in range(5)]
        loaded.send(*(Add(request(name, seed=i)) for i, name in enumerate(names)))
        together = loaded.until_finished(*names)
        for i, name in enumerate(names):
            loaded.send(Add(request(name, seed=i)))
            assert tokens(loaded.until_finished(name)[name]) == tokens(together[name])

    @pytest.mark.parametrize(
        ("refused", "reason"),
        [
            (request("bad", max_tokens=500), "256 at most"),
            (request("bad", prompt=(1, 97)), "token id 97"),
            (Request("bad", (1,), drafter="psychic"), "no drafter 'psychic'"),
        ],
        ids=["too long", "foreign token", "unknown drafter"],
    )
    def test_a_refusal_is_an_output_and_serving_goes_on(self, loaded: Process, refused: Request, reason: str) -> None:
        loaded.send(Add(refused), Add(request("good")))
        outputs = loaded.until_finished("bad", "good")
        (refusal,) = outputs["bad"]
        assert refusal.finish_reason == "error"
        assert refusal.error is not None
        assert reason in refusal.error
        assert refusal.token_ids == []
        assert len(tokens(outputs["good"])) == 6

    def test_an_aborted_request_is_heard_of_no_more(self, loaded: Process) -> None:
        loaded.send(Add(request("gone", max_tokens=200)), Abort("gone"), Abort("never there"), Add(request("c")))
        outputs = loaded.until_finished("c")
        assert len(tokens(outputs["c"])) == 6

    def test_one_choice_can_be_aborted_alone(self, loaded: Process) -> None:
        params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
        loaded.send(Add(Request("e", (1, 5, 9), params, n=3)), Abort("e", 0), Abort("e", 2), Abort("e", 7))
        outputs = loaded.until_finished("e")["e"]
        assert {output.index for output in outputs} == {1}
        assert len(tokens(outputs)) == 6

    def test_an_abort_in_the_middle_frees_the_name(self, loaded: Process) -> None:
        loaded.send(Add(request("d", max_tokens=240)))
        first = loaded.outputs()
        assert [output.request_id for output in first] == ["d"]
        loaded.send(Abort("d"), Add(request("d", max_tokens=3)))
        received = tokens(first)
        while True:
            for output in loaded.outputs():
                received += output.token_ids
                if output.finish_reason is not None:
                    assert output.finish_reason == "length"
                    assert len(received) < 240, "the first was cut off, the second came to its end"
                    return


class TestEnds:
    def test_a_bad_model_is_told_and_exits_2(self, tmp_path: Path) -> None:
        with worker() as process:
            process.send(Start(EngineConfig(model=str(tmp_path / "lost"))))
            event = process.receive()
            assert isinstance(event, Fatal)
            assert str(tmp_path / "lost") in event.message
            assert process.receive() is None
            assert process.exit_code() == 2

    def test_it_logs_what_it_is_told_to(self, tmp_path: Path) -> None:
        root = logging.getLogger()
        before = root.level
        try:
            code, _ = in_process(Start(EngineConfig(model=str(tmp_path / "lost")), "error"))
            assert (code, root.level) == (2, logging.ERROR)
        finally:
            root.setLevel(before)

    def test_closing_the_pipe_ends_it_in_the_middle_of_a_request(self, config: EngineConfig) -> None:
        with worker() as process:
            process.send(Start(config), Add(request("a", max_tokens=250)))
            process.ready()
            assert process.outputs()
            process.hang_up()
            rest: list[Event] = []
            while (event := process.receive()) is not None:
                rest.append(event)
            assert process.exit_code() == 0
            assert len(rest) < 200, "it did not finish the request first"

    def test_closing_the_pipe_closes_the_engine(self, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        closed: list[Engine] = []

        def close(engine: Engine) -> None:
            closed.append(engine)

        monkeypatch.setattr(Engine, "close", close)
        code, _ = in_process(Start(config))
        assert (code, len(closed)) == (0, 1)

    def test_closing_the_pipe_before_the_start_ends_it(self) -> None:
        assert in_process() == (0, [])

    def test_whatever_else_comes_first_is_fatal(self) -> None:
        code, events = in_process(Abort("a"), Start(EngineConfig()))
        assert code == 1
        (fatal,) = events
        assert isinstance(fatal, Fatal)
        assert "Abort" in fatal.message


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 4), ("150000 100000", 2), ("800000 100000", 4), (None, 4)])
def test_a_container_has_as_many_cores_as_its_quota_lasts_for(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr("skippy.engine.worker.CPU_LIMIT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert usable_cores() == cores
