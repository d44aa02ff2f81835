"""What the log says about the drafter that serves requests which name none. Pure Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from skippy.engine.config import EngineConfig


def describe_choice(chosen: str, has_adapter: bool, config: EngineConfig, training: Callable[[], str]) -> str:
    """One line for the log: what `--drafter auto` took, and why.

    Args:
        has_adapter: of whichever kind.
        training: says what a training takes here; asked only where there is none.
    """
    if has_adapter:
        return f"drafter {chosen}: the model has an adapter; what repeats is looked up instead"
    what = "what repeats is looked up"
    if chosen == "hybrid":
        what += ", for the rest the likeliest tokens of before are drafted again"
    return (
        f"drafter {chosen}: the model has no adapter, so {what}; to train one, {training()}: {train_command(config)}, "
        "then --adapter adapter"
    )


def describe_learning(chosen: str, folder: str) -> str:
    """The line where an adapter is to be learnt and nothing is learnt yet."""
    until = "nothing is drafted" if chosen == "s3d" else "what repeats is looked up"
    return f"drafter {chosen}: {until} until an adapter is learnt in {folder}"


def train_command(config: EngineConfig) -> str:
    """What trains an adapter for the model of a configuration, loaded as it says."""
    default = EngineConfig()
    flags = {name: getattr(config, name) for name in ("revision", "device", "dtype", "quantization")}
    changed = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in flags.items()
        if value != getattr(default, name)
    ]
    return " ".join(("skippy train", shlex.quote(config.model), "-o adapter", *changed))
