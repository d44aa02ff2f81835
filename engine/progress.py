"""How far something long is: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from huggingface_hub.utils.tqdm import tqdm

LOG_SECONDS = 5.0
_TEXT = "{percentage:.0f}%, {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"

logger = logging.getLogger("skippy.engine")


class LoggedBar(tqdm):
    """A bar of bytes that logs its text instead of drawing itself; a bar of anything else says nothing."""

    monitor_interval = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Whoever makes the bar, as the hub's client does, asks for one to look at.
        kwargs |= {"disable": kwargs.get("unit") != "B", "bar_format": _TEXT, "file": io.StringIO(), "leave": False}
        kwargs |= {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS}
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log the state; tqdm passes an empty message, and a place on the screen, to wipe the bar away."""
        del pos
        if msg is None and self.total:
            logger.info("%s: %s", self.desc.removesuffix(": "), self)


def bar_class() -> type[tqdm]:
    """What a bar of bytes is made of here, to be called as tqdm is."""
    return tqdm if sys.stderr.isatty() else LoggedBar
