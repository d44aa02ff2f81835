"""Which drafter serves requests that name none, and what to say about it. Pure Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable


def describe_choice(chosen: str, has_adapter: bool, model: str, training: Callable[[], str]) -> str:
    """One line for the log: what `--drafter auto` took, and why.

    Args:
        has_adapter: of whichever kind.
        model: as the user named it.
        training: says what a training takes here; asked only where there is none.
    """
    if has_adapter:
        return f"drafter {chosen}: the model has an adapter; what repeats is looked up instead"
    what = "what repeats is looked up"
    if chosen == "hybrid":
        what += ", for the rest the likeliest tokens of before are drafted again"
    return f"drafter {chosen}: the model has no adapter, so {what}; to train one, {training()}: {train_command(model)}"


def describe_learning(chosen: str, folder: str) -> str:
    """The line where an adapter is to be learnt and nothing is learnt yet."""
    until = "nothing is drafted" if chosen == "s3d" else "what repeats is looked up"
    return f"drafter {chosen}: {until} until an adapter is learnt in {folder}"


def train_command(model: str) -> str:
    """What trains an adapter for a model."""
    return f"skippy train {shlex.quote(model)} -o adapter"
