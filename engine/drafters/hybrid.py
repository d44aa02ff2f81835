"""Lookup where the text repeats itself, another drafter where it does not."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from skippy.engine.drafters.base import Drafter, Keeper
from skippy.engine.drafters.suffix import SuffixDrafter
from skippy.engine.sequence import Sequence

DECAY = 0.98
"""What the other drafter's last draft leaves of what its drafts came to before."""


class HybridDrafter:
    """Looks up first, which costs nothing, and asks another drafter where that promises less.

    That is, where fewer tokens of the lookup are expected to be accepted than were of the
    other's drafts lately.
    """

    name = "hybrid"

    def __init__(self, lookup: SuffixDrafter, other: Drafter) -> None:
        self._lookup = lookup
        self._other = other
        self._asked: set[Sequence] = set()
        """Sequences whose last draft was the other's."""
        self._accepted = 0.0
        """Of the other's drafts, on average."""

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """Who drafts, for whom it concerns what the verify pass computed."""
        return (self._lookup, self._other)

    def release(self, sequence: Sequence) -> None:
        self._asked.discard(sequence)
        for drafter in self.parts:
            if isinstance(drafter, Keeper):
                drafter.release(sequence)

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        self._learn(sequences)
        found = [self._lookup.look_up(s, limit) for s, limit in zip(sequences, limits, strict=True)]
        drafts = [lookup.draft for lookup in found]
        left = [place for place, lookup in enumerate(found) if not lookup.draft or lookup.promise < self._accepted]
        if left:
            others = self._other.propose([sequences[place] for place in left], [limits[place] for place in left])
            for place, draft in zip(left, others, strict=True):
                if draft:
                    drafts[place] = draft
                    self._asked.add(sequences[place])
        return drafts

    def _learn(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._asked:
                self._accepted += (1.0 - DECAY) * (sequence.last_accepted - self._accepted)
                self._asked.discard(sequence)
