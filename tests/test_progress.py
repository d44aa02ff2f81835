"""Bars on a terminal, lines in a log."""

from __future__ import annotations

import logging
import re

import pytest
from huggingface_hub.utils.tqdm import tqdm

from skippy.engine import progress
from skippy.engine.progress import LoggedBar, bar_class


@pytest.mark.parametrize(("terminal", "kind"), [(True, tqdm), (False, LoggedBar)])
def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type[tqdm]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert bar_class() is kind


def test_a_log_line_says_how_far_it_is_and_how_long_still(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "skippy.engine"):
        with LoggedBar(total=16_000_000_000, unit="B", unit_scale=True, desc="reading weights") as bar:
            bar.update(4_000_000_000)
        lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"reading weights: 25%, 4\.00GB of 16\.0GB, \S+B/s, \S+ left", lines[-1]), lines
    assert capfd.readouterr() == ("", "")


def test_what_is_quickly_done_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "skippy.engine"), LoggedBar(total=100, unit="B", desc="reading") as bar:
        for _ in range(100):
            bar.update(1)
    assert caplog.records == []


def test_only_bytes_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "skippy.engine"), LoggedBar(total=9, desc="Fetching 9 files") as bar:
        bar.update(5)
        bar.set_description("fetched")
    assert caplog.records == []
