"""Files of prompts. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from skippy.engine.errors import ConfigError

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class Line(msgspec.Struct):
    """What a line of a file of prompts holds, as far as anybody reads it."""

    prompt: _Text | None = None
    turns: Annotated[list[_Text], msgspec.Meta(min_length=1)] | None = None


_Kind = TypeVar("_Kind", bound=Line)


def read_lines(path: str, kind: type[_Kind]) -> Iterator[_Kind]:
    """The lines of a JSONL file, one by one; each has a prompt or turns.

    Raises:
        ConfigError: the file, or the line that is due, cannot be read or has neither.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=kind)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if entry.prompt is None and entry.turns is None:
            raise ConfigError(f'{path}, line {number}: it has neither a "prompt" nor "turns"')
        yield entry


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """The prompts of a JSONL file, or the first `limit`: each line's "prompt", else the first of its "turns".

    Raises:
        ConfigError: the file, or a line of it that was read, holds none.
    """
    prompts: list[str] = []
    for line in islice(read_lines(path, Line), limit):
        prompts += [line.prompt] if line.prompt is not None else (line.turns or [])[:1]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts
