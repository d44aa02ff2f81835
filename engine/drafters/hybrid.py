"""Prompt lookup where the text repeats itself at length, and S3D where it does not.

A long repetition is the surest draft there is, and finding it costs no pass of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from skippy.engine.drafters.ngram import lookup
from skippy.engine.drafters.s3d import S3DDrafter, S3DFusedDrafter
from skippy.engine.sequence import Sequence

MIN_MATCH = 6
"""Tokens that must have occurred before: with fewer, a trained drafter foresees better."""
LOOKUP_WIDTH = 10
"""Tokens that a lookup may draft: a text that repeats itself goes on doing so."""


class HybridDrafter:
    """Looks up first, and lets the model draft for the sequences in which nothing is found.

    After drafts in vain, of either kind, only a longer repetition counts: the text has turned.
    """

    name = "hybrid"

    def __init__(self, s3d: S3DDrafter | S3DFusedDrafter) -> None:
        self._s3d = s3d
        # Masks ride before anybody knows what a lookup will find, so with them no draft is free.
        self.free_width = LOOKUP_WIDTH if isinstance(s3d, S3DDrafter) else 0
        self.paid_width = 0
        self.free: Collection[Sequence] = ()

    @property
    def taps(self) -> SequenceOf[int]:
        return self._s3d.taps if isinstance(self._s3d, S3DDrafter) else ()

    def observe(self, sequences: SequenceOf[Sequence], hidden: Tensor, tapped: Mapping[int, Tensor]) -> None:
        if isinstance(self._s3d, S3DDrafter):
            self._s3d.observe(sequences, hidden, tapped)

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        drafts = [
            lookup(sequence.tokens, limit, MIN_MATCH + sequence.misses)
            for sequence, limit in zip(sequences, limits, strict=True)
        ]
        left = [place for place, draft in enumerate(drafts) if not draft]
        if self.free_width:
            self.free = {sequence for sequence, draft in zip(sequences, drafts, strict=True) if draft}
        if left:
            others = self._s3d.propose(
                [sequences[place] for place in left], [self._limit(sequences[place], limits[place]) for place in left]
            )
            for place, draft in zip(left, others, strict=True):
                drafts[place] = draft
        return drafts

    def _limit(self, sequence: Sequence, granted: int) -> int:
        return min(granted, self.paid_width) if sequence.adaptive else granted
