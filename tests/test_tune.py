"""Predictions held against decodes: on a machine whose times are made up, and once on this one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support_engine import write_adapter, write_checkpoint

from skippy.engine import ConfigError, Engine, EngineConfig, TuneOptions, run_tune
from skippy.engine.controller import widths_up_to
from skippy.engine.runner import Computed, Rows, Runner
from skippy.engine.tune import COLUMNS, PROMPTS, Sweep
from skippy.server import cli

WIDTHS = widths_up_to(6)
"""Of the drafter s3d with the adapters here."""


class Machine:
    """A clock that only passes move: each takes a time for every layer and for every row in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        compute = Runner.compute

        def timed(runner: Runner, rows: Sequence[Rows], plan: Any, *rest: Any) -> Computed:
            count = sum(len(part.tokens) + len(part.riders) * part.num_ridden for part in rows)
            self.now += len(plan) * (1e-3 + 5e-5 * count)
            return compute(runner, rows, plan, *rest)

        monkeypatch.setattr(Runner, "compute", timed)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "fused"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_level: Callable[..., Any]
) -> Path:
    """A tiny checkpoint with a tokenizer, and beside it an adapter that foresees a little."""
    backend: tokenizers.Tokenizer = byte_level()
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=258)
    backend.save(str(folder / "tokenizer.json"))
    fused: dict[str, Any] = {"fused": True, "skip_start": 0, "skip_end": 0, "bridge_rank": 0} if request.param else {}
    write_adapter(folder, scale=0.001, **fused)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ("abcabcabcab", "def f(x):", "to be, or not to be, that is")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def tune(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", num_threads=1)
    assert run_tune(config, TuneOptions(output=str(output), **options)) == 0
    plan: dict[str, Any] = json.loads(output.read_text())
    return plan


class TestPredictions:
    def test_they_are_what_is_measured_on_a_machine_without_moods(
        self, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Machine(monkeypatch)
        plan = tune(model, tmp_path / "plan.json", prompts=str(prompts), batch_sizes=(2,), max_tokens=32, repeat=1)
        off = {
            (row["drafter"], row["width"]): row["predicted"] / row["measured"] - 1
            for row in plan["rows"]
            if row["batch_size"] == 2
        }
        assert off.keys() == {("s3d", width) for width in WIDTHS}
        assert max(abs(error) for error in off.values()) <= 0.15, off


class TestSweep:
    def test_every_width_has_its_turn_and_the_first_steps_of_one_do_not_count(self) -> None:
        sweep = Sweep(6, WIDTHS, hold=3)
        steps = []
        for _ in range(2 * 3 * len(WIDTHS)):
            width = sweep.width(5)
            steps.append(sweep.take_last())
            assert steps[-1] is not None
            assert steps[-1][:2] == (5, width)
        assert [step[2] for step in steps if step] == [False, True, True] * 2 * len(WIDTHS)
        counted = [step[1] for step in steps if step and step[2]]
        assert sorted(counted) == sorted(WIDTHS * 4)
        assert sweep.take_last() is None

    def test_its_orders_differ(self) -> None:
        sweep = Sweep(6, WIDTHS)
        first, second = ([sweep.width(1) for _ in WIDTHS] for _ in range(2))
        assert sorted(first) == sorted(second) == WIDTHS
        assert first != second


class TestCommand:
    def test_it_tells_and_saves_a_plan_that_serving_takes(
        self, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "deep" / "plan.json"
        flags = [
            "--prompts",
            str(prompts),
            "--batch-sizes",
            "2",
            "--max-tokens",
            "24",
            "--repeat",
            "1",
            "-o",
            str(file),
        ]
        machine = ["--num-threads", "1", "--dtype", "float32"]
        assert cli.main(["tune", str(model), *flags, *machine]) == 0
        out, _ = capsys.readouterr()
        band, _, titles, *_ = out.splitlines()
        shape = json.loads((model / "s3d" / "adapter.json").read_text())
        skipped = f"[{shape['skip_start']}, {shape['skip_end']})"
        assert band == f"s3d: the adapter's band of skipped layers is {skipped} of 3"
        assert all(title in titles for title, *_ in COLUMNS)
        assert out.splitlines()[-1] == f"saved {file}"
        plan = json.loads(file.read_text())
        assert plan["drafters"].keys() == {"s3d"}
        assert plan["drafters"]["s3d"]["seconds"]["2"].keys() == set(map(str, WIDTHS))
        engine = Engine(EngineConfig(model=str(model), dtype="float32", num_threads=1, tuned_plan=str(file)))
        for drafter in ("s3d", "hybrid"):
            prior = engine.drafting._controllers[drafter]._prior
            assert 2 in prior["seconds"]
            assert list(prior["seconds"][2]) == WIDTHS

    def test_without_an_adapter_there_is_nothing_to_tune(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "bare")
        with pytest.raises(ConfigError, match="nothing to tune"):
            run_tune(EngineConfig(model=str(folder), num_threads=1), TuneOptions())

    def test_a_plan_that_cannot_be_written_is_told(self, model: Path, prompts: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot write /dev/null/plan.json"):
            tune(model, Path("/dev/null/plan.json"), prompts=str(prompts))

    def test_too_little_text_is_told(self, model: Path, prompts: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="too little text"):
            tune(model, tmp_path / "p.json", prompts=str(prompts), batch_sizes=(4,), max_tokens=2, limit=1, repeat=1)


def test_the_built_in_prompts_fill_the_largest_batch() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == max(TuneOptions().batch_sizes)
