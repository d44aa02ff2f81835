"""Progress on standard error: one line that is written over on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 10.0
_CLEAR = "\r\x1b[2K"


class Display:
    """Tells how far a command is."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        self._shown = time.monotonic()

    def show(self, text: str) -> None:
        """Say what holds for a moment, unless something was said just now."""
        if time.monotonic() - self._shown >= self._interval:
            self._write(text + ("" if self._terminal else "\n"))

    def keep(self, text: str) -> None:
        """Say what stays."""
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        sys.stderr.write((_CLEAR if self._terminal else "") + text)
        sys.stderr.flush()
        self._shown = time.monotonic()


def duration(seconds: float) -> str:
    """As 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
