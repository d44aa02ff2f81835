"""Who learns what from a verify pass: drafters see their own sequences' part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from skippy.engine.drafters.base import Drafter, Followed, Follower, Reader
from skippy.engine.drafters.s3d import S3DFusedDrafter
from skippy.engine.runner import Computed
from skippy.engine.scheduler import Schedule, Work
from skippy.engine.sequence import Sequence
from skippy.engine.tensors import to_device


class Audience:
    """The drafters that want to see something of a pass, by the name that sequences know them by.

    Args:
        fused: the drafter whose masks ride in the pass, if there is one.
    """

    def __init__(self, fused: S3DFusedDrafter | None) -> None:
        self._fused = fused
        self._followers: dict[str, Follower] = {}
        self._readers: dict[str, Reader] = {}

    def seat(self, name: str, parts: Iterable[Drafter]) -> None:
        """Show what concerns sequences of the drafter `name` to these, and no more to those before."""
        for seats in (self._followers, self._readers):
            seats.pop(name, None)
        for part in parts:
            if isinstance(part, Follower):
                self._followers[name] = part
            if isinstance(part, Reader):
                self._readers[name] = part

    def taps(self, schedule: Schedule) -> set[int]:
        """The layers whose input somebody wants to see of this pass."""
        names = {work.sequence.drafter for work in schedule.work}
        return {layer for name, follower in self._followers.items() if name in names for layer in follower.taps}

    def show(self, schedule: Schedule, drafts: SequenceOf[list[int]], computed: Computed, logits: Tensor) -> None:
        """Show a pass, once its tokens are committed."""
        self._show_riders(schedule, drafts, computed.riders)
        self._show_all(schedule, drafts, computed.tapped)
        self._show_logits(schedule, drafts, logits)

    def _show_riders(self, schedule: Schedule, drafts: SequenceOf[list[int]], riders: Tensor) -> None:
        """What became of the masks behind each sequence's newest computed token."""
        if self._fused is None:
            return
        newest: dict[Sequence, Tensor] = {}
        end = 0
        for work, draft in zip(schedule.work, drafts, strict=True):
            end += (len(draft) + 1) * work.riders
            sequence = work.sequence
            if sequence.finish_reason is None and stands(work):
                unaccepted = work.start + work.num_known + len(draft) - sequence.computed
                last = end - unaccepted * work.riders
                newest[sequence] = riders[last - work.riders : last]
                sequence.ridden = work.riders
        self._fused.collect(newest)

    def _show_all(self, schedule: Schedule, drafts: SequenceOf[list[int]], tapped: Mapping[int, Tensor]) -> None:
        """Every row that the pass computed and that stands."""
        if not self._followers:
            return
        parts: dict[str, list[Followed]] = {}
        row = 0
        for work, draft in zip(schedule.work, drafts, strict=True):
            sequence = work.sequence
            if sequence.finish_reason is None and stands(work):
                part = Followed(sequence, row, work.start, sequence.computed - work.start)
                parts.setdefault(sequence.drafter, []).append(part)
            row += work.num_known + len(draft)
        for name, follower in self._followers.items():
            if name in parts:
                follower.follow(parts[name], tapped)

    def _show_logits(self, schedule: Schedule, drafts: SequenceOf[list[int]], logits: Tensor) -> None:
        """The logits that the sequences got, and the tokens that these follow."""
        tokens: dict[str, list[int]] = {}
        rows: dict[str, list[int]] = {}
        end = 0
        for work, draft in zip(schedule.work, drafts, strict=True):
            sequence, count = work.sequence, work.num_logits(len(draft))
            end += count
            if sequence.drafter in self._readers and stands(work):
                known = sequence.tokens[work.start : work.start + work.num_known]
                tokens.setdefault(sequence.drafter, []).extend([*known, *draft][-count:])
                rows.setdefault(sequence.drafter, []).extend(range(end - count, end))
        for name, reader in self._readers.items():
            if name in rows:
                reader.read(tokens[name], logits[to_device(rows[name], logits.device)])


def stands(work: Work) -> bool:
    """Whether anything of it was committed, and not erased because something of it was not finite."""
    return work.sequence.computed > work.start
