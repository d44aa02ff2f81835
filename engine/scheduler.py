"""Decides what one step computes. Pure Python, no torch: it is tested as arithmetic.

Prompts and outputs are not told apart. A sequence has `computed` cached tokens and
`len(tokens)` known ones, and a step moves `computed` towards `len(tokens)`: a prompt by
chunks, an output by its newest token and the drafted ones behind it. What runs already is
served before what waits, which is let in while rows, blocks and places last. A running
sequence that finds no block preempts the newest one, which is recomputed later
and, because its noise depends on token indices alone, goes on with the same tokens.

Drafts take blocks and rows that are left when all that is decided; where prompts wait, half of those
rows at most. Riders, the rows of a fused drafter, take what is left behind those. Their blocks go
back after the step. So drafting preempts nobody, and keeps nobody waiting for a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from skippy.engine.blocks import BlockAllocator, extend_digests
from skippy.engine.errors import InvalidRequest
from skippy.engine.sequence import Sequence

_NO_WIDTHS: Mapping[str, int] = {}
PROMPT_LOGPROB_ROWS = 64
"""Prompt rows that get logits are computed in chunks of so many: logits are large."""


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one sequence in one step: known tokens from `start`, then drafted ones.

    Slots exist for `num_slots` rows from position `start`.
    """

    sequence: Sequence
    start: int
    num_known: int
    lookahead: int
    riders: int = 0
    """How many rows ride behind each row that chooses a token."""

    @property
    def num_slots(self) -> int:
        return self.num_known + self.lookahead + self.num_riders

    @property
    def num_riders(self) -> int:
        return self.riders * (self.lookahead + 1)

    @property
    def chooses(self) -> bool:
        """The last known row is the newest token: the step chooses what follows it."""
        return self.start + self.num_known == len(self.sequence.tokens)

    def num_logits(self, num_drafted: int) -> int:
        """How many rows, counted from the last, need logits if so many tokens are drafted.

        At least one: a value that is not finite anywhere before shows in the last row, and
        must be seen before the next step builds on it.
        """
        if self.sequence.params.prompt_logprobs is not None and self.start < self.sequence.prompt_len:
            return self.num_known + num_drafted
        return num_drafted + 1


@dataclass(frozen=True, slots=True)
class Schedule:
    work: list[Work] = field(default_factory=list)
    preempted: int = 0


class Scheduler:
    """Admits, reserves, preempts and finishes sequences over one pool of blocks.

    Args:
        max_rows: most rows of one step (known and drafted tokens together); at least max_num_seqs.
    """

    def __init__(
        self, blocks: BlockAllocator, block_size: int, max_num_seqs: int, max_rows: int, prefix_caching: bool
    ) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_rows
        self._prefix_caching = prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def prefills_next(self) -> bool:
        """Whether the next step computes more than what decodes, as far as can be told before it is scheduled."""
        if not all(sequence.decoding for sequence in self.running):
            return True
        if not self.waiting or len(self.running) == self._max_num_seqs:
            return False
        return self._blocks.num_free >= self._blocks_for(len(self.waiting[0].tokens))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: it could not fit the pool even alone.
        """
        needed = self._blocks_for(self._slots_at_most(sequence))
        if needed > self._blocks.num_blocks:
            raise InvalidRequest(
                f"The prompt and max_tokens need {needed} KV blocks of {self._block_size} tokens, and the whole "
                f"cache has {self._blocks.num_blocks}. Shorten the prompt, lower max_tokens, or serve with a larger "
                "kv_cache_memory_bytes.",
                "max_tokens",
            )
        self.waiting.append(sequence)

    def schedule(self, widths: Mapping[str, int] = _NO_WIDTHS) -> Schedule:
        """What the next step computes; blocks for all of it are held when this returns.

        Args:
            widths: by drafter, the most tokens to draft for each adaptive sequence, now and, by riders, next time.
        """
        wanted = {sequence: self._wanted_lookahead(sequence, widths) for sequence in self.running}
        # Prompts get what drafts leave, and half of what decoding leaves at least.
        kept = min(sum(wanted.values()), (self._max_rows - len(self.running)) // 2)
        work, preempted = self._go_on(self._max_rows - kept)
        rows = self._max_rows - kept - sum(one.num_known for one in work)
        if not preempted:
            rows = self._admit(work, rows)
        # Last, because a draft is worth no preemption and keeps nobody waiting.
        rows = self._seat_drafts(work, rows + kept, wanted)
        self._seat_riders(work, rows, widths)
        return Schedule(work, preempted)

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Count `computed` tokens as cached and verified, and publish the blocks they fill."""
        sequence.computed = computed
        self._blocks.trim(sequence.table, self._blocks_for(len(sequence.tokens)))
        if not self._prefix_caching:
            return
        extend_digests(sequence.digests, sequence.tokens, self._block_size, computed)
        while (sequence.published + 1) * self._block_size <= computed:
            self._blocks.publish(sequence.table[sequence.published], sequence.digests[sequence.published])
            sequence.published += 1

    def preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait, first in line, and be computed anew."""
        self.running.remove(sequence)
        self._blocks.release(sequence.table)
        sequence.computed = sequence.published = sequence.ridden = 0
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks, wherever it stands."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._blocks.release(sequence.table)

    def _go_on(self, rows: int) -> tuple[list[Work], int]:
        """The known tokens of what runs, blocks held for them, and how many sequences were preempted for that."""
        work: list[Work] = []
        preempted = 0
        for place, sequence in enumerate(list(self.running)):
            if sequence not in self.running:
                continue  # preempted by an older one just now
            # One row is kept for each sequence behind, so nobody starves behind a long prompt.
            known = min(_rows_left(sequence), rows - (len(self.running) - place - 1))
            slots = sequence.computed + known
            while not self._reserve(sequence, slots) and sequence in self.running:
                self.preempt(self.running[-1])
                preempted += 1
            if sequence in self.running:
                work.append(Work(sequence, sequence.computed, known, 0))
                rows -= known
        return work, preempted

    def _admit(self, work: list[Work], rows: int) -> int:
        """Let in what waits while there is room; returns how many rows are left."""
        passed_over: list[Sequence] = []
        while self.waiting and rows > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting.popleft()
            if self._prefix_caching and sequence.leader is not None and self._is_ahead(sequence.leader):
                passed_over.append(sequence)
                continue
            if not self._start(sequence):
                self.waiting.appendleft(sequence)
                break
            known = min(_rows_left(sequence), rows)
            work.append(Work(sequence, sequence.computed, known, 0))
            rows -= known
            self.running.append(sequence)
        self.waiting.extendleft(reversed(passed_over))
        return rows

    def _seat_drafts(self, work: list[Work], rows: int, wanted: Mapping[Sequence, int]) -> int:
        """Make room for drafts, evenly, as far as rows and blocks last; returns how many rows are left."""
        drafting = [place for place, one in enumerate(work) if wanted.get(one.sequence)]
        for turn, place in enumerate(drafting):
            one = work[place]
            lookahead = min(wanted[one.sequence], rows // (len(drafting) - turn), self._spare_slots(one))
            if lookahead > 0:
                self._reserve(one.sequence, one.start + one.num_known + lookahead)
                work[place] = replace(one, lookahead=lookahead)
                rows -= lookahead
        return rows

    def _seat_riders(self, work: list[Work], rows: int, widths: Mapping[str, int]) -> None:
        """Give riders to work that chooses, as far as rows and blocks last. The next drafts are no longer than that."""
        for place, one in enumerate(work):
            room = min(rows, self._spare_slots(one)) // (one.lookahead + 1)
            seated = replace(one, riders=min(room, self._wanted_riders(one, widths)))
            if seated.riders > 0:
                self._reserve(one.sequence, one.start + seated.num_slots)
                work[place] = seated
                rows -= seated.num_riders

    def _spare_slots(self, work: Work) -> int:
        """Slots that the sequence has, or could have without anybody giving one up, behind those of its work."""
        slots = (len(work.sequence.table) + self._blocks.num_free) * self._block_size
        return slots - work.start - work.num_slots

    def _start(self, sequence: Sequence) -> bool:
        """Hold blocks for every known token, reusing verified ones; False if there are too few."""
        if self._prefix_caching and sequence.params.prompt_logprobs is None:
            # The newest token is always computed: its logits are needed.
            upto = len(sequence.tokens) - 1
            extend_digests(sequence.digests, sequence.tokens, self._block_size, upto)
            sequence.table = self._blocks.share(sequence.digests[: upto // self._block_size])
        sequence.computed = sequence.published = len(sequence.table)
        sequence.computed *= self._block_size
        if not self._reserve(sequence, len(sequence.tokens)):
            self._blocks.release(sequence.table)
            sequence.computed = sequence.published = 0
            return False
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        return True

    def _reserve(self, sequence: Sequence, slots: int) -> bool:
        needed = self._blocks_for(slots) - len(sequence.table)
        if needed <= 0:
            return True
        riders = sequence.max_draft * (sequence.max_draft + 1) if sequence.rides else 0
        room = self._blocks_for(self._slots_at_most(sequence) + riders) - len(sequence.table) - needed
        return self._blocks.extend(sequence.table, needed, max(0, room))

    def _is_ahead(self, leader: Sequence) -> bool:
        return leader.finish_reason is None and not leader.prompt_computed

    def _wanted_lookahead(self, sequence: Sequence, widths: Mapping[str, int]) -> int:
        """Drafts end one token before max_len: the verifier's own token is always the last."""
        if not sequence.decoding:
            return 0
        most = min(_most(sequence, widths), sequence.ridden) if sequence.rides else _most(sequence, widths)
        return max(0, min(most, sequence.max_len - len(sequence.tokens) - 1))

    def _wanted_riders(self, work: Work, widths: Mapping[str, int]) -> int:
        """As many as the next step can draft tokens, which has at least one more that is known."""
        sequence = work.sequence
        if not sequence.rides or not work.chooses:
            return 0
        return max(0, min(_most(sequence, widths), sequence.max_len - len(sequence.tokens) - 2))

    def _slots_at_most(self, sequence: Sequence) -> int:
        # The last token of an output is never fed back, so it needs no slot.
        return max(sequence.prompt_len, sequence.max_len - 1)

    def _blocks_for(self, slots: int) -> int:
        return -(-slots // self._block_size)


def _most(sequence: Sequence, widths: Mapping[str, int]) -> int:
    return min(sequence.max_draft, widths.get(sequence.drafter, 0)) if sequence.adaptive else sequence.max_draft


def _rows_left(sequence: Sequence) -> int:
    left = len(sequence.tokens) - sequence.computed
    if sequence.params.prompt_logprobs is not None and not sequence.prompt_computed:
        return min(left, PROMPT_LOGPROB_ROWS)
    return left
