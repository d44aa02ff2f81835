"""Lookup where the text repeats itself, another drafter where it does not."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from collections.abc import Set

from skippy.engine.drafters.base import Drafter, Keeper
from skippy.engine.drafters.suffix import MAX_DRAFT, Lookup, SuffixDrafter
from skippy.engine.sequence import Sequence

DECAY = 0.98
"""What the other drafter's last draft leaves of what its drafts came to before."""

COST_SHARE = 0.05
"""How far one step moves what drafts are found to cost."""
LARGEST_COST = 2.0
"""What takes longer did not take it for drafting."""


class HybridDrafter:
    """Looks up first, which costs no pass, and asks another drafter where that promises less.

    That is, where the tokens that a step with the lookup is expected to emit are fewer, for the
    time it takes, than those of the steps with the other's drafts lately.

    Args:
        draft_cost: what a draft of the other's takes, in verify passes, until it is timed.

    Attributes:
        free_width: the most tokens of a draft that costs nothing but its rows; 0 if the other's cost no more.
        free: whose drafts of this step cost nothing; those whose last step this is are among them.
    """

    name = "hybrid"

    def __init__(self, lookup: SuffixDrafter, other: Drafter, draft_cost: float = 0.0) -> None:
        self._lookup = lookup
        self._other = other
        self._draft_cost = draft_cost
        self.free_width = MAX_DRAFT if draft_cost else 0
        self._paid_width = 0
        self.free: Set[Sequence] = frozenset()
        self._asked: set[Sequence] = set()
        """Sequences for which the other drafted in the last step, whatever came of it."""
        self._draft_seconds = 0.0
        """Of the other's last drafts."""
        self._accepted = 0.0
        """In steps in which the other drafted, on average."""

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """Who drafts, for whom it concerns what the verify pass computed."""
        return (self._lookup, self._other)

    def release(self, sequence: Sequence) -> None:
        self._asked.discard(sequence)
        for drafter in self.parts:
            if isinstance(drafter, Keeper):
                drafter.release(sequence)

    def forget(self) -> None:
        self._accepted = 0.0
        for drafter in self.parts:
            if isinstance(drafter, Keeper):
                drafter.forget()

    def time(self, verify_seconds: float) -> None:
        """What the verify pass behind the last proposal took, in which the other drafted."""
        if self.free_width:
            cost = min(self._draft_seconds / verify_seconds, LARGEST_COST)
            self._draft_cost += COST_SHARE * (cost - self._draft_cost)

    def begin(self, paid_width: int) -> None:
        """Before each step: the most tokens of the other's drafts for adaptive sequences."""
        self._paid_width, self.free = paid_width, frozenset()

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        self._learn(sequences)
        found = [self._lookup.look_up(s, limit) for s, limit in zip(sequences, limits, strict=True)]
        drafts = [lookup.draft for lookup in found]
        left = [place for place, lookup in enumerate(found) if not self._suffices(lookup)]
        granted = [self._limit(sequences[i], limits[i]) for i in left]
        began = time.perf_counter()
        others = self._other.propose([sequences[i] for i in left], granted)
        self._draft_seconds = time.perf_counter() - began
        self._asked = {sequences[place] for place, limit in zip(left, granted, strict=True) if limit}
        for place, draft in zip(left, others, strict=True):
            if draft:
                drafts[place] = draft
        if self.free_width:
            self.free = {s for s, draft in zip(sequences, drafts, strict=True) if draft and s not in self._asked}
        return drafts

    def _suffices(self, lookup: Lookup) -> bool:
        """Whether a step with this draft promises more tokens for its time than one with the other's."""
        return bool(lookup.draft) and (1 + lookup.promise) * (1 + self._draft_cost) >= 1 + self._accepted

    def _limit(self, sequence: Sequence, granted: int) -> int:
        return min(granted, self._paid_width) if sequence.adaptive else granted

    def _learn(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._asked:
                self._accepted += (1.0 - DECAY) * (sequence.last_accepted - self._accepted)
