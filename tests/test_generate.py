"""The loop of `skippy generate` over an engine that answers by heart."""

from __future__ import annotations

from typing import cast

import pytest

from skippy.engine import DraftCounts, Engine, EngineDead, Request, SequenceOutput, StepOutput, StepStats
from skippy.server.generate import run, summary


class ScriptedEngine:
    def __init__(self, *steps: list[SequenceOutput]) -> None:
        self.steps = list(steps)
        self.added: list[Request] = []

    def add(self, request: Request) -> None:
        self.added.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.steps)

    def step(self) -> StepOutput:
        return StepOutput(self.steps.pop(0), StepStats())


def output(*token_ids: int, error: str | None = None) -> SequenceOutput:
    return SequenceOutput("r", 0, list(token_ids), DraftCounts(4, 6, 5), "ngram", error=error)


REQUEST = Request("r", (1,))


def test_outputs_come_in_order_and_steps_without_any_are_passed_over() -> None:
    engine = ScriptedEngine([output(1)], [], [output(2, 3)])
    assert [out.token_ids for out in run(cast(Engine, engine), REQUEST)] == [[1], [2, 3]]
    assert engine.added == [REQUEST]


def test_an_error_on_the_way_is_raised_after_what_came_before_it() -> None:
    outputs = run(cast(Engine, ScriptedEngine([output(1)], [output(error="the pass failed")])), REQUEST)
    assert next(outputs).token_ids == [1]
    with pytest.raises(EngineDead, match="the pass failed"):
        next(outputs)


def test_summary() -> None:
    assert summary(output(7), count=9, seconds=0.5) == (
        "9 tokens in 0.50 s (18.0 tokens/s), 2.25 tokens per step, drafter ngram: 6 drafted, 5 accepted"
    )
