"""The `skippy` command. Nothing here imports torch until a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any, NoReturn

from skippy.engine import ConfigError, EngineConfig, SamplingParams, SkippyError
from skippy.server import DISTRIBUTION
from skippy.server.settings import (
    CONFIG_VARIABLE,
    Resolved,
    Settings,
    Value,
    default_text,
    flag_of,
    is_switch,
    kind_of,
    load,
    nearest,
    setting_names,
    variable_of,
)
from skippy.server.settings_docs import description_of

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

_METAVARS = {
    "integer": "N",
    "number": "X",
    "bytes": "BYTES",
    "text": "TEXT",
    "integer|auto": "N|auto",
    "bytes|auto": "BYTES|auto",
}


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of one command that is not a setting. `parse` is bool for a switch."""

    name: str
    parse: Callable[[str], Any]
    help: str
    default: Any = None
    metavar: str = "N"
    short: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the user asked one command to do."""

    settings: Settings
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """`settings` are those that the command has a flag for."""

    summary: str
    run: Callable[[Invocation], int]
    settings: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    position: Option | None = None


# --- what the commands do ---------------------------------------------------------------------------------------


def _serve(invocation: Invocation) -> int:
    from skippy.server.app import run_server

    return run_server(invocation.settings)


def _generate(invocation: Invocation) -> int:
    options = {name: value for name, value in invocation.options.items() if value is not None}
    prompt = options.pop("prompt")
    params = SamplingParams(**options)
    from skippy.server.generate import generate

    return generate(invocation.settings.engine_config(), prompt, params)


def _bench(invocation: Invocation) -> int:
    from skippy.engine import BenchOptions, run_bench

    return run_bench(invocation.settings.engine_config(), BenchOptions(**invocation.options))


def _train(invocation: Invocation) -> int:
    from skippy.engine import TrainOptions, run_training

    options = dict(invocation.options)
    output = options.pop("output")
    return run_training(invocation.settings.engine_config(), TrainOptions(**options), output)


def _plan(invocation: Invocation) -> int:
    from skippy.engine import PlanOptions, run_plan

    return run_plan(invocation.settings.engine_config(), PlanOptions(**invocation.options))


def _tune(invocation: Invocation) -> int:
    from skippy.engine import TuneOptions, run_tune

    return run_tune(invocation.settings.engine_config(), TuneOptions(**invocation.options))


def _verify(invocation: Invocation) -> int:
    from skippy.server.verify import VerifyOptions, run_verify

    options = dict(invocation.options)
    url, timeout = options.pop("url"), options.pop("timeout")
    return run_verify(url, VerifyOptions(**options), timeout)


# --- their flags ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def names(text: str) -> tuple[str, ...]:
    """What stands between the commas, at least one."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected at least one value, got {text!r}")
    return found


def batch_sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in names(text))


_PROMPTS_HELP = 'JSONL file with a "prompt" or "turns" in each line'

# Defaults that are None are those of SamplingParams.
_GENERATE_OPTIONS = (
    Option("prompt", str, "what to continue", metavar="TEXT", short=("-p",), required=True),
    Option("max_tokens", int, "most tokens to generate", 128),
    Option("temperature", float, "0 always takes the likeliest token", 0.0, "X"),
    Option("top_p", float, "keep the likeliest tokens up to this share", metavar="X"),
    Option("top_k", int, "keep this many tokens; 0 keeps all"),
    Option("min_p", float, "drop tokens below this fraction of the likeliest", metavar="X"),
    Option("presence_penalty", float, "lower tokens that the output has", metavar="X"),
    Option("frequency_penalty", float, "lower tokens as often as the output has them", metavar="X"),
    Option("repetition_penalty", float, "weaken tokens seen before; 1 does nothing", metavar="X"),
    Option("min_tokens", int, "do not end before this many tokens"),
    Option("seed", int, "makes sampling repeatable"),
    Option("ignore_eos", bool, "go on to max_tokens even where the model ends", default=False),
)

_DRAFTERS_HELP = (
    "drafters to compare, with G tokens drafted per step, or as many as the engine chooses; all must emit the same "
    "tokens (default: none,ngram,hybrid and, where there is an adapter, s3d)"
)

_BENCH_OPTIONS = (
    Option("prompts", str, _PROMPTS_HELP, metavar="FILE", required=True),
    Option("drafters", names, _DRAFTERS_HELP, metavar="DRAFTER[:G],..."),
    Option("batch_sizes", batch_sizes, "how many prompts run at the same time", (1, 4, 16), "N,..."),
    Option("max_tokens", positive, "tokens to generate for each prompt", 128),
    Option("temperature", float, "0 always takes the likeliest token", 0.0, "X"),
    Option("top_p", float, "keep the likeliest tokens up to this share", 1.0, "X"),
    Option("seed", int, "seed of the first prompt", 0),
    Option("limit", positive, "take only the first N prompts"),
    Option("repeat", positive, "measure this often and take the median", 3),
    Option("plot", str, "draw the figures; needs matplotlib, the extra skippy-serve[plot]", metavar="FILE.png"),
)

_FROM_MODEL = "; unset: by the size of the model"

_TRAIN_OPTIONS = (
    Option(
        "output",
        str,
        "folder to train in; a run that was stopped there goes on",
        metavar="DIR",
        short=("-o",),
        required=True,
    ),
    Option("data", str, f"{_PROMPTS_HELP}, which open up to three in four of the texts; unset: none", metavar="FILE"),
    Option(
        "exclude",
        str,
        "JSONL file of evaluation texts: no training text shares 13 words in a row with any",
        metavar="FILE",
    ),
    Option("steps", int, "training steps", 2000),
    Option("sequences", int, "sequences that the model writes to learn from", 2048),
    Option("length", int, "tokens per sequence", 320),
    Option("batch_size", int, "sequences per step", 8),
    Option("anchors", int, "places in a sequence that a step drafts from", 48),
    Option("learning_rate", float, "its peak", 8e-3, "X"),
    Option("tv_share", float, "share of total variation in the loss, after a first quarter of KL", 0.7, "X"),
    Option("seed", int, "seed of the text and of the training", 0),
    Option("gradient_checkpointing", bool, "compute draft rows twice to save memory; unset: if it would not suffice"),
    Option("num_speculative_tokens", int, "most tokens that one pass drafts", 6),
    Option("skip_start", int, "first layer that a draft skips" + _FROM_MODEL),
    Option("skip_end", int, "first layer that a draft goes on with" + _FROM_MODEL),
    Option("lora_rank", int, "rank of the changes of the layers that are kept; 0 leaves them out" + _FROM_MODEL),
    Option("head_size", int, "size of the head that ties drafted tokens together; 0 leaves it out" + _FROM_MODEL),
    Option("bridge_rank", int, "rank of the bridge over the skipped layers; 0 leaves it out" + _FROM_MODEL),
    Option("recurrent", bool, "the head hands a state from token to token", default=True),
    Option("draft_vocab_size", int, "most frequent tokens that can be drafted; 0 for all" + _FROM_MODEL),
    Option("fused", bool, "draft within the verify pass, through every layer", default=False),
)

_VERIFY_OPTIONS = (
    Option("prompts", str, f"{_PROMPTS_HELP}; a built-in list without it", metavar="FILE"),
    Option("count", positive, "comparisons to make", 200),
    Option("max_tokens", positive, "tokens per answer", 64),
    Option("concurrency", positive, "requests at a time in the crowd", 16),
    Option("seed", int, "seed of the first case", 0),
    Option("timeout", positive, "seconds to wait for one answer", 300),
)

_PLAN_OPTIONS = (
    Option("gpu", str, "what to plan for: a10g, t4, l4, 3090, 4090, h100 or cpu", metavar="NAME", required=True),
    Option("json", bool, "print one JSON object", default=False),
)

_TUNE_OPTIONS = (
    Option(
        "output",
        str,
        "file for the plan; unset: the one that serve finds by itself, in the user's cache directory",
        metavar="FILE",
        short=("-o",),
    ),
    Option("prompts", str, f"{_PROMPTS_HELP}; a built-in list without it", metavar="FILE"),
    Option("batch_sizes", batch_sizes, "how many prompts run at the same time", (1, 4, 16), "N,..."),
    Option("max_tokens", positive, "tokens to generate for each prompt", 64),
    Option("temperature", float, "0 always takes the likeliest token", 0.0, "X"),
    Option("seed", int, "seed of the first prompt", 0),
    Option("limit", positive, "take only the first N prompts"),
    Option("repeat", positive, "sweep and measure this often", 2),
)

# Only a server has idle moments to learn in.
_ENGINE_SETTINGS = tuple(field.name for field in fields(EngineConfig) if field.name != "learn")

# A benchmark names its drafters and draft lengths itself, and a cached prompt would flatter every run but the first.
_BENCH_SETTINGS = tuple(
    name for name in _ENGINE_SETTINGS if name not in ("drafter", "num_speculative_tokens", "enable_prefix_caching")
)

# What the others say is measured, or read from a file that does not exist yet.
_PLAN_SETTINGS = (
    "model",
    "revision",
    "dtype",
    "quantization",
    "max_model_len",
    "max_num_seqs",
    "block_size",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
)
_TUNE_SETTINGS = tuple(name for name in _BENCH_SETTINGS if name != "tuned_plan")

# The rest is of no use to a training, or an option of it.
_TRAIN_SETTINGS = ("model", "revision", "device", "dtype", "quantization", "num_threads")

COMMANDS = {
    "serve": Command("answer OpenAI API requests over HTTP", _serve, settings=setting_names()),
    "generate": Command("continue one prompt, without a server", _generate, _ENGINE_SETTINGS, _GENERATE_OPTIONS),
    "bench": Command(
        "compare the speed of drafters and check that all emit the same tokens",
        _bench,
        _BENCH_SETTINGS,
        _BENCH_OPTIONS,
    ),
    "train": Command("teach a model to draft for itself", _train, _TRAIN_SETTINGS, _TRAIN_OPTIONS),
    "verify": Command(
        "check that a running server answers the same however it drafts",
        _verify,
        options=_VERIFY_OPTIONS,
        position=Option("url", str, "the server, as http://localhost:8000", metavar="URL"),
    ),
    "plan": Command(
        "predict what a model would need and do on a card, from its configuration", _plan, _PLAN_SETTINGS, _PLAN_OPTIONS
    ),
    "tune": Command("measure how much drafting pays on this machine, for serve", _tune, _TUNE_SETTINGS, _TUNE_OPTIONS),
}


# --- parsing ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is 2 and told in one line."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SkippyError as error:
        print(f"skippy: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Our reader left (`skippy generate | head`): keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
    arguments, rest = build_parser().parse_known_args(argv)
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            raise ConfigError(f"unexpected argument {name!r}")
        raise ConfigError(f"unknown flag {name}{nearest(name, arguments.flags)}")
    if arguments.command is None:
        raise ConfigError(f"what to do? one of {', '.join(COMMANDS)} (skippy --help says more)")
    command = COMMANDS[arguments.command]
    settings = Settings()
    if command.settings:
        resolved = _resolve(arguments, command.settings)
        if arguments.print_config:
            print(resolved.as_yaml(), end="")
            return 0
        settings = resolved.settings
    return command.run(Invocation(settings, _option_values(command, arguments)))


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as ConfigError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help says more)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command. What it parses carries `command` and `flags`, those of that command."""
    parser = _Parser(prog="skippy", description="Serve a language model: same tokens, fewer steps.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=version(DISTRIBUTION))
    parser.set_defaults(flags=["--help", "--version"])
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        actions = _add_options(subparser, command)
        if command.settings:
            actions += _add_settings(subparser, command.settings)
        subparser.set_defaults(flags=["--help", *(flag for action in actions for flag in action.option_strings)])
    return parser


def _add_options(parser: argparse.ArgumentParser, command: Command) -> list[argparse.Action]:
    if command.position:
        position = command.position
        parser.add_argument(position.name, metavar=position.metavar, help=position.help)
    actions = []
    for option in command.options:
        flags = (*option.short, flag_of(option.name))
        if option.parse is bool:
            switch = "store_true" if option.default is False else argparse.BooleanOptionalAction
            actions.append(parser.add_argument(*flags, action=switch, default=option.default, help=option.help))
            continue
        help_text = option.help + (" (required)" if option.required else "")
        if option.default is not None:
            default = option.default
            help_text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
        parse = _unless_empty(option.parse)
        actions.append(parser.add_argument(*flags, type=parse, metavar=option.metavar, help=help_text))
    return actions


def _option_values(command: Command, arguments: argparse.Namespace) -> dict[str, Any]:
    values = {}
    for option in (*command.options, *([command.position] if command.position else [])):
        given = getattr(arguments, option.name)
        values[option.name] = option.default if given is None else given
        # Not argparse's `required`, which would complain of a missing flag before an unknown one.
        if option.required and not given:
            raise ConfigError(f"{arguments.command} needs {flag_of(option.name)} {option.metavar}")
    return values


def _unless_empty(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An empty string means that the flag was not given."""

    def convert(text: str) -> Any:
        return parse(text) if text else None

    convert.__name__ = parse.__name__  # argparse names it in its messages
    return convert


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[argparse.Action]:
    """The settings as flags (the model as a position), and the two flags about settings."""
    actions = []
    group = parser.add_argument_group(
        "settings",
        f"a flag wins over its {variable_of('')}* variable, that over the --config file, that over the default",
    )
    for name in names:
        default = default_text(name)
        help_text = description_of(name).replace("%", "%%") + (f" (default: {default})" if default else "")
        if name == "model":
            actions.append(group.add_argument("model", nargs="?", metavar="MODEL", help=help_text))
        elif is_switch(name):
            actions.append(group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=help_text))
        else:
            metavar = _METAVARS.get(kind_of(name), "{" + kind_of(name).replace("|", ",") + "}")
            actions.append(group.add_argument(flag_of(name), metavar=metavar, help=help_text))
    config_help = f"YAML file of settings, one 'name: value' per line (variable: {CONFIG_VARIABLE})"
    actions.append(group.add_argument("--config", metavar="FILE", help=config_help))
    print_help = "print every setting with its origin, as YAML, and exit"
    actions.append(group.add_argument("--print-config", action="store_true", help=print_help))
    return actions


def _resolve(arguments: argparse.Namespace, names: Sequence[str]) -> Resolved:
    layer = {}
    for name in names:
        given = getattr(arguments, name)
        if isinstance(given, bool):
            layer[name] = Value(str(given).lower(), flag_of(name if given else f"no_{name}"))
        elif given:
            layer[name] = Value(given, "MODEL" if name == "model" else flag_of(name))
    # Only a server learns: what the environment says to it may not even suit other commands' settings.
    return load(layer, os.environ, arguments.config, without={"learn"}.difference(names))


if __name__ == "__main__":
    sys.exit(main())
