"""What every drafter is."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from skippy.engine.sequence import Sequence


class Drafter(Protocol):
    """Proposes tokens; a wrong proposal costs time and nothing else."""

    @property
    def name(self) -> str: ...

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        """At most limits[i] tokens to follow sequences[i], each list possibly empty.

        Every sequence has `computed == len(tokens) - 1`, and KV slots for its newest token
        and limits[i] more: a drafter that runs the model may use them as scratch.
        """
        ...
