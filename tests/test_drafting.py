"""How widely the engine's drafters may draft, and what their controllers hear of it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

from support_engine import run_dry, write_adapter, write_checkpoint

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.controller import Controller


class Watched(Controller):
    """Keeps what it granted to steps that were to be timed, and what it was told of."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.granted: list[int] = []
        self.timed: list[int] = []

    def width(self, batch: int) -> int:
        self.granted.append(super().width(batch))
        return self.granted[-1]

    def observe(self, batch: int, width: float, seconds: float, accepted: SequenceOf[int], others: int = 0) -> None:
        self.timed.append(self.granted[-1])
        super().observe(batch, width, seconds, accepted, others)


def test_without_drafts_no_rows_are_kept_for_them(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(model=str(write_checkpoint(tmp_path)), device="cpu", num_speculative_tokens=16))
    engine.add(Request("r", (1, 5), SamplingParams(max_tokens=4), drafter="none"))
    engine.add(Request("s", (1, 5), SamplingParams(max_tokens=4), drafter="ngram"))
    assert [sequence.max_draft for sequence in engine.states] == [0, 16]


def test_widths_are_looked_at_only_in_steps_that_are_timed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    adapter = str(write_adapter(folder, tmp_path / "adapter", num_speculative_tokens=5))
    engine = Engine(EngineConfig(model=str(folder), device="cpu", adapter=adapter, max_num_seqs=3))
    controller = Watched(4)
    engine.drafting.control("s3d", controller)
    prefills: list[bool] = []
    requests = [
        Request(
            str(i),
            (1, 5 + i),
            SamplingParams(max_tokens=9 + 4 * (i % 3), temperature=0, ignore_eos=True),
            drafter="s3d",
        )
        for i in range(12)
    ]
    run_dry(engine, requests, on_step=lambda stats: prefills.append(stats.prefill_seconds > 0))
    assert sum(prefills) > 4
    assert len(controller.timed) >= 10
    assert controller.timed == controller.granted
