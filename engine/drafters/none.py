"""Plain decoding: nothing is drafted."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from skippy.engine.sequence import Sequence


class NoDrafter:
    name = "none"

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        del limits
        return [[] for _ in sequences]
