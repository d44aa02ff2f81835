"""The line of figures of `skippy generate`; the command itself is tested in test_cli."""

from __future__ import annotations

from skippy.engine import DraftCounts, SequenceOutput
from skippy.server.generate import summary


def test_summary() -> None:
    last = SequenceOutput("r", 0, [7], DraftCounts(4, 6, 5), "ngram")
    assert summary(last, count=9, seconds=0.5) == (
        "9 tokens in 0.50 s (18.0 tokens/s), 2.25 tokens per step, drafter ngram: 6 drafted, 5 accepted"
    )
