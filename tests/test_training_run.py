"""`skippy train`: it can stop anywhere, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from support_engine import run_dry, write_checkpoint
from support_training import OPTIONS, training_config

from skippy.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams
from skippy.engine.adapter_files import load_adapter
from skippy.engine.errors import TrainingError
from skippy.engine.training import run as run_module
from skippy.engine.training.display import Display
from skippy.engine.training.files import load_samples
from skippy.engine.training.options import TrainOptions
from skippy.engine.training.run import run_training
from skippy.engine.training.trainer import Trainer
from skippy.engine.weights import open_checkpoint
from skippy.server import cli
from skippy.server.settings import flag_of

FILES = {"adapter.json", "adapter.safetensors", "data.safetensors", "progress.jsonl"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return training_config(tmp_path_factory.mktemp("model"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: str) -> None:
    """Let a step of a training be its last."""
    run_step = Trainer.run_step

    def run(trainer: Trainer) -> float:
        if trainer.step == step and action == "fail":
            raise TrainingError("step failed")
        value = run_step(trainer)
        if trainer.step == step and action == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return value

    monkeypatch.setattr(Trainer, "run_step", run)


def steps_recorded(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "progress.jsonl").read_text().splitlines()]


def result_of(output: Path) -> dict[str, Any]:
    """What a finished folder holds, without the seconds that it took."""
    lines = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    return {
        "adapter": (output / "adapter.safetensors").read_bytes(),
        "progress": [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines],
    }


@pytest.fixture(scope="module")
def finished(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing interrupted."""
    output = tmp_path_factory.mktemp("finished") / "new" / "folder"
    assert run_training(config, OPTIONS, str(output)) == 0
    return output


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, though the tests may have been started where it does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestRun:
    def test_what_a_finished_folder_holds(self, config: EngineConfig, finished: Path) -> None:
        assert set(os.listdir(finished)) == FILES
        adapter = load_adapter(finished, open_checkpoint(config.model), torch.float32, torch.device("cpu"))
        assert adapter.config == OPTIONS.adapter_config(open_checkpoint(config.model).config, 10)
        assert load_file(finished / "data.safetensors")["tokens"].shape == (32, 40)
        assert load_file(finished / "data.safetensors")["tokens"].dtype == torch.int32
        lines = [json.loads(line) for line in (finished / "progress.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        for line in lines:
            assert 0 < line["seconds"] <= line["total_seconds"] - line["generation_seconds"]
            assert len(line["sampled"]["by_depth"]) == 3

    def test_the_command(
        self, config: EngineConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = {name: value for name, value in asdict(OPTIONS).items() if value != getattr(TrainOptions(), name)}
        flags = [f"{flag_of(name)}={value}" for name, value in given.items()]
        command = ["train", config.model, "-o", str(tmp_path), "--dtype", "float32", "--device", "cpu", *flags]
        assert cli.main([*command, "--num-threads", "1"]) == 0
        assert result_of(tmp_path) == result_of(finished)
        out, err = capsys.readouterr()
        assert out == ""
        assert "\nstep 12 of 12, after 0:0" in err
        assert cli.main([*command, "--seed", "1"]) == 2
        assert "was made with another seed (0, now 1)" in capsys.readouterr().err

    def test_the_engine_drafts_with_it(self, config: EngineConfig, finished: Path) -> None:
        engine = Engine(replace(config, adapter=str(finished)))
        assert engine.info.drafter == "hybrid"
        outputs = run_dry(engine, [Request("x", (1, 2), SamplingParams(max_tokens=8, ignore_eos=True))])
        assert outputs["x", 0][-1].counts.drafted > 0

    def test_run_again_it_does_nothing(
        self, config: EngineConfig, finished: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
        assert run_training(config, OPTIONS, str(finished)) == 0
        assert "nothing to do" in capsys.readouterr().err
        assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == before

    def test_a_killed_run_goes_on_as_if_nothing_had_been(
        self, config: EngineConfig, finished: Path, tmp_path: Path
    ) -> None:
        script = (
            "import os, signal, sys\n"
            "from skippy.engine import EngineConfig, TrainOptions\n"
            "from skippy.engine.training import run\n"
            "run.CHECKPOINT_SECONDS = 0\n"
            "save = run._Run.save\n"
            "def save_and_die(self):\n"
            "    save(self)\n"
            "    if self.trainer.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
            "run._Run.save = save_and_die\n"
            f"run.run_training({config!r}, {OPTIONS!r}, sys.argv[1])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert set(os.listdir(tmp_path)) == {"checkpoint.safetensors", "data.safetensors", "progress.jsonl"}
        with (tmp_path / "progress.jsonl").open("a") as file:
            file.write('{"step": 6}\n{"st')  # of a step whose checkpoint was never written
        (tmp_path / "data.new").write_bytes(b"half")
        assert run_training(config, OPTIONS, str(tmp_path)) == 0
        assert result_of(tmp_path) == result_of(finished)
        assert not (tmp_path / "checkpoint.safetensors").exists()

    @pytest.mark.usefixtures("interruptible")
    def test_an_interrupt_waits_for_the_step_and_is_gone_on_from(
        self,
        config: EngineConfig,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, 7, "interrupt")
            with pytest.raises(KeyboardInterrupt):
                run_training(config, OPTIONS, str(tmp_path))
        assert capsys.readouterr().err.splitlines()[-1] == (
            "interrupted at step 7: the same command goes on from there"
        )
        assert steps_recorded(tmp_path) == [1, 2, 3, 4, 5, 6]
        with pytest.raises(ConfigError, match=r"checkpoint.safetensors was made with another steps \(12, now 13\)"):
            run_training(config, replace(OPTIONS, steps=13), str(tmp_path))
        assert run_training(config, OPTIONS, str(tmp_path)) == 0
        assert "from step 7 to 12" in capsys.readouterr().err
        assert result_of(tmp_path) == result_of(finished)

    @pytest.mark.usefixtures("interruptible")
    def test_an_interrupt_while_the_adapter_is_written_comes_too_late(
        self, config: EngineConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = run_module._Run._finish

        def interrupted(run: run_module._Run) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            finish(run)

        with monkeypatch.context() as patch:
            patch.setattr(run_module._Run, "_finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_training(config, OPTIONS, str(tmp_path))
        assert not (tmp_path / "checkpoint.safetensors").exists()
        assert result_of(tmp_path) == result_of(finished)

    @pytest.mark.usefixtures("interruptible")
    def test_an_interrupt_while_the_text_is_written_leaves_nothing(
        self, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Display, "show", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run_training(config, OPTIONS, str(tmp_path))
        assert "nothing of it is kept" in capsys.readouterr().err
        assert os.listdir(tmp_path) == []

    def test_an_error_keeps_the_last_good_checkpoint(
        self, config: EngineConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, 8, "fail")
            with pytest.raises(TrainingError, match="step failed"):
                run_training(config, OPTIONS, str(tmp_path))
        assert load_file(tmp_path / "checkpoint.safetensors")["step"] == 8
        assert run_training(config, OPTIONS, str(tmp_path)) == 0
        assert result_of(tmp_path) == result_of(finished)

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"learning_rate": 1e-3}, "learning_rate"),
            ({"recurrent": False}, "recurrent"),
            ({"skip_end": 2}, "skip_end"),
        ],
    )
    def test_other_options_need_another_folder(
        self, config: EngineConfig, finished: Path, changes: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ConfigError, match=rf"adapter.json was made with another {name} .*another folder"):
            run_training(config, replace(OPTIONS, **changes), str(finished))

    def test_text_of_other_options_or_another_model_is_not_trained_on(
        self, config: EngineConfig, finished: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "output"
        output.mkdir()
        (output / "data.safetensors").write_bytes((finished / "data.safetensors").read_bytes())
        with pytest.raises(ConfigError, match=r"data\.safetensors was made with another length"):
            run_training(config, replace(OPTIONS, length=41), str(output))
        other = write_checkpoint(tmp_path / "other", num_hidden_layers=4, vocab_size=98)
        with pytest.raises(ConfigError, match=r"data\.safetensors was made with another model: use"):
            run_training(replace(config, model=str(other)), OPTIONS, str(output))
        # Only what the text depends on counts.
        assert run_training(config, replace(OPTIONS, steps=1), str(output)) == 0

    def test_prompts_are_continued_and_overlaps_are_dropped(
        self, byte_level: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_checkpoint(tmp_path / "model", num_hidden_layers=4, vocab_size=258)
        backend: tokenizers.Tokenizer = byte_level()
        backend.save(str(model / "tokenizer.json"))
        prompts, excluded = tmp_path / "prompts.jsonl", tmp_path / "excluded.jsonl"
        texts = [f"{i} b c d e f g h i j k l m n" for i in range(10, 20)]  # the last word is written on
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        solution = {"prompt": f"x {texts[0][:9]}", "canonical_solution": texts[0][9:]}
        excluded.write_text(json.dumps(solution) + "\n\n" + json.dumps({"turns": ["y", f"z {texts[1]}"]}) + "\n")
        config = EngineConfig(model=str(model), device="cpu", dtype="float32", num_threads=1)
        options = replace(OPTIONS, steps=1, length=60, data=str(prompts), exclude=str(excluded))
        assert run_training(config, options, str(tmp_path / "out")) == 0
        assert f"2 sequences overlap with {excluded}" in capsys.readouterr().err
        samples, _ = load_samples(tmp_path / "out" / "data.safetensors")
        assert len(samples) == 30
        openings = {backend.decode(sample.tokens[: sample.start]) for sample in samples}
        assert openings & set(texts) == set(texts[2:])
        prompts.write_text('{"prompt": "another"}\n')
        with pytest.raises(ConfigError, match="made with another data: use another folder"):
            run_training(config, options, str(tmp_path / "out"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [('{"text": 1}\n', "line 1: it has neither"), ("\n{\n", "line 2: "), ('{"turns": [1]}', "line 1: Expected")],
    )
    def test_a_bad_line_of_the_excluded_texts(
        self, config: EngineConfig, tmp_path: Path, content: str, message: str
    ) -> None:
        (tmp_path / "e.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=message):
            run_training(config, replace(OPTIONS, exclude=str(tmp_path / "e.jsonl")), str(tmp_path / "out"))

    @pytest.mark.parametrize("content", [b"", b"\x08" * 64])
    def test_a_damaged_checkpoint_is_told(
        self, config: EngineConfig, finished: Path, tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "data.safetensors").write_bytes((finished / "data.safetensors").read_bytes())
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoint\.safetensors cannot be read"):
            run_training(config, OPTIONS, str(tmp_path))

    @pytest.mark.parametrize("content", ["[", "[]", "{}", '{"training": {"by": "hand"}}'])
    def test_a_folder_with_a_foreign_adapter_is_left_alone(
        self, config: EngineConfig, tmp_path: Path, content: str
    ) -> None:
        (tmp_path / "adapter.json").write_text(content)
        with pytest.raises(ConfigError, match="use another folder"):
            run_training(config, OPTIONS, str(tmp_path))
        assert (tmp_path / "adapter.json").read_text() == content
