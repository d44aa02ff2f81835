"""`skippy bench`: its plans, its figures and its record, on a tiny random model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from support_engine import EchoDrafter, write_checkpoint

from skippy.engine import BenchOptions, ConfigError, DraftCounts, EngineConfig, SamplingParams, run_bench
from skippy.engine import bench as bench_module
from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.adapter_files import save_adapter
from skippy.engine.bench import COLUMNS, DraftPlan, hold_against_ngram
from skippy.engine.engine import Engine
from skippy.engine.measure import Run, decode
from skippy.engine.weights import open_checkpoint
from skippy.server import cli

ROW_KEYS = {
    "plan",
    "drafter",
    "num_speculative_tokens",
    "batch_size",
    "tokens_per_second",
    "ratio",
    "tokens_per_step",
    "tokens_per_step_looping",
    "tokens_per_step_not_looping",
    "not_looping_against_ngram",
    "looping_share",
    "acceptance",
    "mean_draft_tokens",
    "acceptance_by_depth_of_all_drafts",
    "acceptance_by_depth_where_drafted",
    "draft_ms",
    "verify_ms",
    "peak_memory_bytes",
    "kv_blocks_peak",
    "differing_outputs",
}
MAX_DRAFT = 3


class EngineWithEcho(Engine):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.add_drafter(EchoDrafter())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, byte_level: Callable[..., tokenizers.Tokenizer]) -> Path:
    """A tiny checkpoint with a tokenizer, and beside it an untrained adapter."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=258)
    byte_level().save(str(folder / "tokenizer.json"))
    checkpoint = open_checkpoint(str(folder))
    torch.manual_seed(0)
    shape = AdapterConfig(1, 2, MAX_DRAFT, lora_rank=2, head_size=8, bridge_rank=2, recurrent=True)
    save_adapter(folder / "s3d", S3DAdapter(shape, checkpoint.config), checkpoint, {})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abcabcabcab", "def f(x):", "to be, or")))
    return path


def lines_of(model: Path, options: BenchOptions, capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    assert run_bench(EngineConfig(model=str(model), block_size=8, **settings), options) == 0
    return capsys.readouterr().out.splitlines()


class TestPlans:
    @pytest.mark.parametrize(
        ("text", "plan"),
        [("none", DraftPlan("none")), ("ngram:1", DraftPlan("ngram", 1)), ("s3d:32", DraftPlan("s3d", 32))],
    )
    def test_a_plan_is_a_drafter_and_maybe_a_number(self, text: str, plan: DraftPlan) -> None:
        assert DraftPlan.parse(text) == plan
        assert str(plan) == text

    @pytest.mark.parametrize("text", ["s3d:", "s3d:x", "s3d:0", "s3d:-1", "s3d:04", "s3d:1:2", ":3", "", "none:4"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--drafters"):
            DraftPlan.parse(text)

    @pytest.mark.parametrize(
        ("drafters", "message"),
        [
            ("s3d:x", "expected DRAFTER or DRAFTER:G with a G of at least 1, got 's3d:x'"),
            ("none,s3d:0", "got 's3d:0'"),
            ("none,s3d:99", "s3d:99 asks for more than the 3 tokens that can be drafted at once"),
            ("none,s3d:4", "s3d:4 asks for more than the 3 tokens"),
            ("none,ngram:33", "ngram:33 asks for more than the 32 tokens"),
            ("none,ngram,none", "none is there twice"),
            (
                "none,crystal-ball:2",
                "There is no drafter 'crystal-ball'; there are: none, ngram, suffix",
            ),
        ],
    )
    def test_mistakes_are_told_in_one_line(
        self, model: Path, prompts: Path, drafters: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["bench", str(model), "--prompts", str(prompts), "--drafters", drafters]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("skippy: error: ")
        assert message in err


class TestCommand:
    @pytest.fixture
    def options(self, monkeypatch: pytest.MonkeyPatch) -> list[BenchOptions]:
        """Those that the command hands over."""
        given: list[BenchOptions] = []

        def run(config: EngineConfig, options: BenchOptions) -> int:
            assert config.model == "folder"
            given.append(options)
            return 0

        monkeypatch.setattr("skippy.engine.run_bench", run)
        return given

    def test_it_parses_lists(self, options: list[BenchOptions]) -> None:
        flags = ["--drafters", "none, s3d:2", "--batch-sizes", "2", "--limit", "5", "--plot", "a.png"]
        assert cli.main(["bench", "folder", "--prompts", "f", *flags]) == 0
        assert options == [BenchOptions("f", ("none", "s3d:2"), batch_sizes=(2,), limit=5, plot="a.png")]

    def test_it_has_the_defaults_of_its_options(self, options: list[BenchOptions]) -> None:
        assert cli.main(["bench", "folder", "--prompts", "f"]) == 0
        assert options == [BenchOptions(prompts="f")]

    def test_a_bad_line_of_the_prompts_is_named(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
        assert cli.main(["bench", str(model), "--prompts", str(tmp_path / "prompts.jsonl")]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "line 2: Expected" in err


@pytest.fixture(scope="module")
def lines(model: Path, prompts: Path) -> list[str]:
    """What a bench of several plans prints."""
    script = (
        "import sys; from skippy.server.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or (9 if 'matplotlib' in sys.modules else 0))"
    )
    flags = ["--drafters", "none,ngram,ngram:2,s3d:2,s3d", "--batch-sizes", "1,2", "--max-tokens", "24"]
    command = [sys.executable, "-c", script, "bench", str(model), "--prompts", str(prompts), "--repeat", "2"]
    done = subprocess.run(
        [*command, *flags, "--num-threads", "1", "--block-size", "8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr  # 9: it loaded matplotlib, and nobody asked for a plot
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def record(lines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class TestRecord:
    def test_every_plan_has_a_row_at_every_batch_size(self, record: dict[str, Any]) -> None:
        plans = ["none", "ngram", "ngram:2", "s3d:2", "s3d"]
        assert record["options"]["drafters"] == plans
        assert [(row["batch_size"], row["plan"]) for row in record["rows"]] == [(b, p) for b in (1, 2) for p in plans]
        assert all(row.keys() == ROW_KEYS for row in record["rows"])

    def test_all_emit_the_same_and_the_first_is_the_measure(self, record: dict[str, Any]) -> None:
        assert record["differing_outputs"] == 0
        for row in record["rows"]:
            assert row["differing_outputs"] == 0
            assert row["tokens_per_second"] > 0
            assert row["ratio"] == 1.0 if row["plan"] == "none" else row["ratio"] > 0
            assert row["looping_share"] == record["looping_share"]

    def test_what_drafts(self, record: dict[str, Any]) -> None:
        for row in record["rows"]:
            depths = row["acceptance_by_depth_of_all_drafts"]
            assert len(depths) == len(row["acceptance_by_depth_where_drafted"])
            assert all(a <= b <= 1 for a, b in zip(depths, row["acceptance_by_depth_where_drafted"], strict=True))
            if row["plan"] == "none":
                assert (row["tokens_per_step"], row["draft_ms"], depths) == (1.0, 0.0, [])
            if row["num_speculative_tokens"]:
                assert len(depths) <= row["num_speculative_tokens"] == 2
                assert row["mean_draft_tokens"] <= 2
            if row["plan"] == "s3d:2":
                assert row["draft_ms"] > 0

    def test_memory(self, record: dict[str, Any]) -> None:
        assert record["kv_bytes"] > 0
        for row in record["rows"]:
            # 11 prompt tokens and 24 more are at most 5 blocks of 8: drafts need no room of their own.
            assert 0 < row["kv_blocks_peak"] <= 5 * row["batch_size"] <= record["kv_blocks"]
            assert 10 * 2**20 < row["peak_memory_bytes"] < 2**40

    def test_the_weights_are_pinned(self, record: dict[str, Any], model: Path) -> None:
        assert record["model_sha256"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        adapter = (model / "s3d" / "adapter.safetensors").read_bytes()
        assert record["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
        assert record.keys() >= {"device", "dtype", "quantization", "threads", "torch", "skippy"}

    def test_the_table(self, lines: list[str]) -> None:
        assert lines[0] == "3 prompts, 24 tokens each, temperature 0.0"
        assert lines[1].startswith("KV cache of ")
        for title, _, _, _ in COLUMNS:
            assert title in lines[2]
        assert [line.split()[:2] for line in lines[3:5]] == [["1", "none"], ["1", "ngram"]]
        assert lines[-2] == "0 outputs differ from those of none"


def test_without_plans_every_drafter_that_there_is_takes_part(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BenchOptions(str(prompts), batch_sizes=(1,), max_tokens=4, limit=1, repeat=1)
    rows = json.loads(lines_of(model, options, capsys)[-1])["rows"]
    assert [row["plan"] for row in rows] == ["none", "ngram", "s3d", "hybrid"]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(model / name)
    record = json.loads(lines_of(tmp_path, options, capsys, drafter="s3d")[-1])
    assert [r["plan"] for r in record["rows"]] == ["none", "ngram", "hybrid"]
    assert record["adapter_sha256"] is None


def test_how_a_server_drafts_does_not_matter(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[EngineConfig] = []

    class Recorded(Engine):
        def __init__(self, config: EngineConfig) -> None:
            built.append(config)
            super().__init__(config)

    monkeypatch.setattr(bench_module, "Engine", Recorded)
    options = BenchOptions(str(prompts), batch_sizes=(1,), max_tokens=4, limit=1, repeat=1)
    record = json.loads(lines_of(model, options, capsys, drafter="none", num_speculative_tokens=1)[-1])
    assert [row["plan"] for row in record["rows"]] == ["none", "ngram", "s3d", "hybrid"]
    assert record["adapter_sha256"] is not None
    assert [config.num_speculative_tokens for config in built] == [None]


def test_every_plan_is_warmed_up_before_any_is_measured(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int, int, int | None]] = []

    def spy(
        engine: Engine, given: list[tuple[int, ...]], drafter: str, batch_size: int, params: SamplingParams, width: int
    ) -> Run:
        calls.append((drafter, len(given), params.max_tokens, width))
        return decode(engine, given, drafter, batch_size, params, width)

    monkeypatch.setattr(bench_module, "Engine", EngineWithEcho)
    monkeypatch.setattr(bench_module, "decode", spy)
    lines_of(model, BenchOptions(str(prompts), ("none", "echo:2"), (2,), max_tokens=20, repeat=2), capsys)
    turn = [("none", 3, 20, None), ("echo", 3, 20, 2)]
    assert calls == [("none", 2, 16, None), ("echo", 2, 16, 2), *turn, *turn]


def test_outputs_that_differ_in_any_turn_are_counted(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = 0

    def tamper(*arguments: Any) -> Run:
        nonlocal turns
        run = decode(*arguments)
        turns += 1
        # Two warm-ups, then none, ngram, none, ngram: the last turn of ngram goes wrong.
        return replace(run, outputs=[[0], *run.outputs[1:]]) if turns == 6 else run

    monkeypatch.setattr(bench_module, "decode", tamper)
    options = BenchOptions(str(prompts), ("none", "ngram"), (1,), max_tokens=4, repeat=2)
    assert run_bench(EngineConfig(model=str(model)), options) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["differing_outputs"] for row in record["rows"]] == [0, 1]


class TestFigures:
    def test_tokens_per_step_of_both_kinds_apart(self) -> None:
        loop, other = [5] * 40, list(range(40))
        row = bench_module._row(DraftPlan("ngram"), 1, *[[make_run([loop, other], [10, 32])] * 2] * 2)
        assert (row["tokens_per_step_looping"], row["tokens_per_step_not_looping"]) == (4.0, 1.25)
        assert row["looping_share"] == 0.5
        row = bench_module._row(DraftPlan("ngram"), 1, *[[make_run([other], [40])]] * 2)
        assert (row["tokens_per_step_looping"], row["tokens_per_step_not_looping"]) == (None, 1.0)

    def test_acceptance_by_depth(self) -> None:
        runs = [replace(make_run([[1]], [1]), drafts=4, drafts_by_depth=[4, 2], accepted_by_depth=[3, 1])]
        runs.append(replace(make_run([[1]], [1]), drafts=4, drafts_by_depth=[4], accepted_by_depth=[1]))
        row = bench_module._row(DraftPlan("s3d"), 1, runs, runs)
        assert row["acceptance_by_depth_of_all_drafts"] == [0.5, 0.125]
        assert row["acceptance_by_depth_where_drafted"] == [0.5, 0.5]
        assert row["acceptance"] == 0.5
        assert row["mean_draft_tokens"] == 1.25

    def test_s3d_is_held_against_the_best_ngram(self) -> None:
        def row(drafter: str, tokens_per_step: float | None) -> dict[str, Any]:
            return {"drafter": drafter, "tokens_per_step_not_looping": tokens_per_step}

        rows = [row("none", 1.0), row("ngram", 1.1), row("ngram", 1.2), row("s3d", 1.8), row("s3d", None)]
        hold_against_ngram(rows)
        assert [r["not_looping_against_ngram"] for r in rows] == [None, None, None, pytest.approx(1.5), None]
        alone = [row("s3d", 1.8)]
        hold_against_ngram(alone)
        assert alone[0]["not_looping_against_ngram"] is None


def make_run(outputs: list[list[int]], steps: list[int]) -> Run:
    """A run that emitted this, in so many steps each, in one second."""
    return Run(
        seconds=1.0,
        tokens=sum(map(len, outputs)),
        steps=sum(steps),
        drafts=0,
        drafts_by_depth=[],
        accepted_by_depth=[],
        draft_seconds=0.0,
        draft_passes=0,
        verify_seconds=0.5,
        verify_passes=sum(steps),
        outputs=outputs,
        counts=[DraftCounts(steps=count) for count in steps],
        peak_memory_bytes=1,
        kv_blocks_peak=1,
    )


def synthetic_record() -> dict[str, Any]:
    """What a plot is drawn from: plans with a number and without, drafts of several depths, two batch sizes."""
    rows = [
        {
            "plan": str(plan),
            "drafter": plan.drafter,
            "num_speculative_tokens": plan.num_speculative_tokens,
            "batch_size": batch_size,
            "ratio": 1.0 if plan.drafter == "none" else 1.2 + 0.1 * (plan.num_speculative_tokens or 0) / batch_size,
            "acceptance_by_depth_where_drafted": [0.9**j for j in range(1, 1 + (plan.num_speculative_tokens or 0))],
        }
        for batch_size in (1, 16)
        for plan in map(DraftPlan.parse, ("none", "ngram", "s3d:2", "s3d:4", "s3d"))
    ]
    return {"model": "builtin", "dtype": "float32", "device": "cpu", "rows": rows}


class TestPlot:
    def test_a_picture_is_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from skippy.engine.plots import plot_bench  # noqa: PLC0415

        plot_bench(synthetic_record(), str(tmp_path / "bench.png"))
        data = (tmp_path / "bench.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(data) > 20_000
        assert "matplotlib.pyplot" not in sys.modules

    def test_one_plan_alone_can_be_drawn(
        self, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "bench.png"
        options = BenchOptions(str(prompts), ("none",), (1,), max_tokens=4, limit=1, repeat=1, plot=str(path))
        assert json.loads(lines_of(model, options, capsys)[-1])["options"]["plot"] == str(path)
        assert path.stat().st_size > 5_000

    def test_without_matplotlib_nothing_is_measured(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delitem(sys.modules, "skippy.engine.plots", raising=False)
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert cli.main(["bench", "/no/such/model", "--prompts", "f", "--plot", "a.png"]) == 2
        told = "skippy: error: --plot needs matplotlib: pip install 'skippy-serve[plot]'.\n"
        assert capsys.readouterr() == ("", told)

    @pytest.mark.parametrize("path", ["/no/such/folder/a.png", "a.pdf", "png"])
    def test_a_file_that_cannot_be_is_refused_at_once(self, path: str) -> None:
        pytest.importorskip("matplotlib")
        with pytest.raises(ConfigError, match=f"FILE.png in a folder that exists, got '{path}'"):
            run_bench(EngineConfig(model="/no/such/model"), BenchOptions("f", plot=path))

    def test_a_picture_that_cannot_be_written_is_told_after_the_record(
        self, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "bench.png"
        path.mkdir()
        options = BenchOptions(str(prompts), ("none",), (1,), max_tokens=4, limit=1, repeat=1, plot=str(path))
        with pytest.raises(ConfigError, match=f"cannot write {path}: Is a directory"):
            run_bench(EngineConfig(model=str(model)), options)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "drafters"
