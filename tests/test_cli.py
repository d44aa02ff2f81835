"""The commands: help, mistakes in one line, and what reaches the code behind them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from skippy.engine import EngineConfig, EngineDead, TrainOptions
from skippy.server import cli
from skippy.server.settings import Settings, flag_of, setting_names


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("SKIPPY_")]:
        monkeypatch.delenv(variable)


def capture(monkeypatch: pytest.MonkeyPatch, command: str) -> list[cli.Invocation]:
    """Replace what a command does by writing down how it was called."""
    calls: list[cli.Invocation] = []

    def run(invocation: cli.Invocation) -> int:
        calls.append(invocation)
        return 0

    given = cli.COMMANDS[command]
    replacement = cli.Command(given.summary, run, given.settings, given.options, given.position)
    monkeypatch.setitem(cli.COMMANDS, command, replacement)
    return calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "what to do.*serve, generate, bench, train, verify"),
        ("sevre", "unknown command 'sevre'; did you mean serve"),
        ("--versio", "unknown flag --versio; did you mean --version"),
        ("serve --max-model-length 9", "unknown flag --max-model-length; did you mean --max-model-len"),
        ("serve --max_num_seqs=9", "unknown flag --max_num_seqs; did you mean --max-num-seqs"),
        ("serve --por 9", "unknown flag --por; did you mean --port"),
        ("serve a b", "unexpected argument 'b'"),
        ("serve --port eighty", "bad value 'eighty' for port .from --port"),
        ("serve --port", "--port: expected one argument"),
        ("serve --config /no/such/file", "cannot read the config file /no/such/file"),
        ("generate", "generate needs --prompt TEXT"),
        ("generate --port 8000 -p x", "unknown flag --port"),
        ("generate -p x --temperature hot", "--temperature: invalid float value"),
        ("generate -p x --top-p 2", "top_p must be in"),
        ("bench", "bench needs --prompts FILE"),
        ("bench --prompts f --no-enable-prefix-caching", "unknown flag --no-enable-prefix-caching"),
        ("bench --prompts f --batch-sizes 1,0", "--batch-sizes: must be at least 1"),
        ("bench --prompts f --batch-sizes ,", "--batch-sizes: expected at least one value, got ','"),
        ("bench --prompts f --drafters ,", "--drafters: expected at least one value, got ','"),
        ("bench --prompts f --batch-sizes 1,x", "--batch-sizes: invalid batch_sizes value"),
        ("train", "train needs --output DIR"),
        ("train -o x --steps many", "--steps: invalid int value"),
        ("train -o x --steps 0", "steps must be at least 1"),
        ("train -o x --drafter none", "unknown flag --drafter"),
        ("train /no/such/folder -o x", "no model folder '/no/such/folder'"),
        ("train -o x --data /no/such/file", "cannot read /no/such/file"),
        ("train -o x --exclude /no/such/file", "cannot read /no/such/file"),
        ("train -o x --skip-start 0 --skip-end 14", r"skip band \[0, 14\) leaves no layer"),
        ("train -o x --length 3000", "length 3000 exceeds the 2048 positions"),
        ("train -o x --sequences 8", "8 sequences are too few"),
        ("train -o x --dtype float16", "float16 has too small a range"),
        ("train -o x --block-size 8", "unknown flag --block-size"),
        ("generate -p x --quantization int4", "bad value 'int4' for quantization"),
        ("train -o /dev/null/x", "cannot write to /dev/null/x"),
        ("verify", "required: URL"),
        ("verify localhost:8000 --count 0", "--count: must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("skippy: error: ")
    assert re.search(message, err), err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_tells_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    given = cli.COMMANDS[command]
    for name in [*(option.name for option in given.options), *given.settings]:
        assert (flag_of(name) if name != "model" else "MODEL") in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_serve_gets_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = capture(monkeypatch, "serve")
    monkeypatch.setenv("SKIPPY_HOST", "::1")
    config = tmp_path / "c.yaml"
    config.write_text("max_waiting: 7")
    flags = ["--port", "9", "--no-enable-prefix-caching", "--dtype", "", "--config", str(config)]
    assert cli.main(["serve", "folder", *flags]) == 0
    assert calls[0].settings == Settings(model="folder", port=9, enable_prefix_caching=False, host="::1", max_waiting=7)


def test_a_switch_can_be_turned_on_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = capture(monkeypatch, "serve")
    monkeypatch.setenv("SKIPPY_ENABLE_PREFIX_CACHING", "false")
    assert cli.main(["serve"]) == 0
    assert cli.main(["serve", "--enable-prefix-caching", ""]) == 0
    assert [call.settings.enable_prefix_caching for call in calls] == [False, True]
    assert calls[1].settings.model == "builtin"


def test_generate_ignores_settings_of_the_server_but_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = capture(monkeypatch, "generate")
    monkeypatch.setenv("SKIPPY_PORT", "9")
    assert cli.main(["generate", "-p", "x", "--seed", "3", "--top-k", "", "--ignore-eos", "--drafter", "none"]) == 0
    options = calls[0].options
    assert (options["prompt"], options["seed"], options["top_k"], options["ignore_eos"]) == ("x", 3, None, True)
    assert (options["max_tokens"], options["temperature"]) == (128, 0.0)
    assert calls[0].settings.drafter == "none"


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_what_serves_nobody_does_not_mind_where_the_server_learns(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []
    name = {"generate": "skippy.server.generate.generate", "bench": "skippy.engine.run_bench"}[command]

    def run(config: EngineConfig, *_: object) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(name, run)
    monkeypatch.setenv("SKIPPY_LEARN", "somewhere")
    options = {"generate": ["-p", "x", "--drafter", "none"], "bench": ["--prompts", "x", "--no-share-drafts"]}
    assert cli.main([command, *options[command]]) == 0
    assert [config.learn for config in configs] == [None]


def test_train_has_the_defaults_of_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = capture(monkeypatch, "train")
    assert cli.main(["train", "-o", "x"]) == 0
    assert cli.main(["train", "m", "-o", "x", "--num-speculative-tokens", "9", "--no-recurrent", "--fused"]) == 0
    options = [dict(call.options) for call in calls]
    assert [option.pop("output") for option in options] == ["x", "x"]
    assert TrainOptions(**options[0]) == TrainOptions()
    assert TrainOptions(**options[1]) == TrainOptions(num_speculative_tokens=9, recurrent=False, fused=True)
    assert [call.settings for call in calls] == [Settings(), Settings(model="m")]


@pytest.mark.parametrize("command", ["serve", "generate", "bench"])
def test_print_config(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "folder", "--block-size", "64", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == Settings(model="folder", block_size=64).model_dump()
    assert "model: folder  # MODEL\n" in text
    assert "block_size: 64  # --block-size\n" in text


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(EngineDead("it\nis gone"), 2, "skippy: error: it is gone\n"), (KeyboardInterrupt(), 130, "")],
)
def test_how_a_command_may_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str
) -> None:
    def run(_: cli.Invocation) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "serve", cli.Command("end", run, setting_names()))
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == told


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: cli.Invocation) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "serve", cli.Command("end", run, setting_names()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve"])


def test_a_reader_that_left_makes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "skippy.server.cli", "serve", "--print-config"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["serve", "--print-config"], ["generate"], ["verify", "http://127.0.0.1:1"]])
def test_light_commands_do_without_torch(arguments: list[str]) -> None:
    script = "import sys; from skippy.server.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def skippy(*arguments: str) -> Any:
    command = [sys.executable, "-m", "skippy.server.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_generate_writes_the_same_text_whatever_the_drafter() -> None:
    flags = ["generate", "-p", "def fibonacci(n):\n", "--max-tokens", "24", "--num-threads", "1", "--dtype", "float32"]
    plain = skippy(*flags, "--drafter", "none")
    drafted = skippy(*flags, "--drafter", "ngram")
    assert plain.returncode == drafted.returncode == 0, plain.stderr + drafted.stderr
    assert plain.stdout == drafted.stdout
    assert len(plain.stdout) > 24
    assert re.fullmatch(
        r"24 tokens in \d+\.\d\d s \(\d+\.\d tokens/s\), 1\.00 tokens per step, drafter none: 0 drafted, 0 accepted\n",
        plain.stderr,
    )
    assert "drafter ngram" in drafted.stderr


@pytest.mark.parametrize("flags", [["/no/such/folder"], ["--drafter", "crystal-ball"]])
def test_generate_without_a_model_or_drafter_says_so_in_one_line(flags: list[str]) -> None:
    done = skippy("generate", *flags, "-p", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("skippy: error: ")
    assert done.stderr.count("\n") == 1
