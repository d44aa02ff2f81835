"""Files of prompts. Pure Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from skippy.engine.errors import ConfigError

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Line(msgspec.Struct):
    prompt: _Text | None = None
    turns: Annotated[list[_Text], msgspec.Meta(min_length=1)] | None = None


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """The prompts of a JSONL file, or the first `limit`: each line's "prompt", else the first of its "turns".

    Raises:
        ConfigError: the file, or a line of it that was read, holds none.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        if len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=_Line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if entry.prompt is not None:
            prompts.append(entry.prompt)
        elif entry.turns is not None:
            prompts.append(entry.turns[0])
        else:
            raise ConfigError(f'{path}, line {number}: it has neither a "prompt" nor "turns"')
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts
