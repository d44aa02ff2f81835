"""Which sequence holds which KV block. Pure Python; the tensors live in `kv`.

A block is in one of four states:

    FREE     holds nothing anybody wants
    ASIDE    free, and right behind a running sequence that is expected to grow into it
    CACHED   free, but its verified KV can still be reused; the oldest is overwritten first
    HELD     referenced by one sequence, or by several that share a verified prefix

ASIDE is only a wish: it keeps the blocks of a sequence next to each other, so that
attention can read them as one view instead of gathering them. Nothing but speed depends
on it, and a block set aside is given away when there is no other.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

FREE, ASIDE, CACHED, HELD = range(4)

Digest = bytes


def extend_digests(digests: list[Digest], tokens: SequenceOf[int], block_size: int, upto: int) -> None:
    """Append the digest of every full block of `tokens[:upto]` that `digests` lacks.

    A digest covers the block and all that precedes it, so equal digests mean equal
    prefixes (SHA-256: nobody can craft a collision to read another user's cache).
    """
    while (len(digests) + 1) * block_size <= upto:
        start = len(digests) * block_size
        parent = digests[-1] if digests else b""
        block = array("q", tokens[start : start + block_size]).tobytes()
        digests.append(hashlib.sha256(parent + block).digest())


class BlockAllocator:
    """Hands out the blocks of one pool and remembers which of them can be reused.

    Invariant, checked by `check`: every block is free (FREE, ASIDE, CACHED) or HELD, and
    a block is HELD exactly while its reference count is above zero.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._state = bytearray(num_blocks)
        self._references = [0] * num_blocks
        self._digest_of: dict[int, Digest] = {}
        self._block_of: dict[Digest, int] = {}
        self._oldest_cached: dict[int, None] = {}
        self._num_held = 0

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_held

    def extend(self, table: list[int], count: int, room: int = 0) -> bool:
        """Append `count` blocks to `table`; False, and nothing changed, if so many are not free.

        `room` is how many more the table may ask for later: they are set aside if possible.
        """
        if count > self.num_free:
            return False
        for i in range(count):
            follower = table[-1] + 1 if table else self._start_of_run(count, room)
            if i == 0 and table and not self._is_blank(follower):
                follower = self._start_of_run(count, room)
            table.append(self._hold(follower if self._is_blank(follower) else self._any_block()))
        if count:
            self._set_aside(table[-1] + 1, room)
        return True

    def release(self, table: list[int]) -> None:
        """Give back every block of `table`, last first, and empty it."""
        if table:
            self._unset_aside(table[-1] + 1)
        while table:
            block = table.pop()
            self._references[block] -= 1
            if self._references[block] == 0:
                self._num_held -= 1
                if block in self._digest_of:
                    self._state[block] = CACHED
                    self._oldest_cached[block] = None
                else:
                    self._state[block] = FREE

    def trim(self, table: list[int], count: int) -> None:
        """Give back what `table` holds beyond its first `count` blocks, none of it published.

        What stands behind these is set aside: the table is expected to grow into it again.
        """
        while len(table) > count:
            block = table.pop()
            assert self._references[block] == 1, "nobody shares scratch"
            assert block not in self._digest_of
            self._references[block] = 0
            self._num_held -= 1
            if table and block == table[-1] + 1:
                self._state[block] = ASIDE
            else:
                self._state[block] = FREE
                self._unset_aside(block + 1)

    def share(self, digests: SequenceOf[Digest]) -> list[int]:
        """Hold the blocks of the longest known prefix of `digests`."""
        table: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._hold(block)
            table.append(block)
        return table

    def publish(self, block: int, digest: Digest) -> None:
        """Let later sequences reuse a held block whose slots are all verified."""
        assert self._state[block] == HELD
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, table: SequenceOf[int]) -> None:
        """Never reuse these blocks: what they hold is not to be trusted."""
        for block in table:
            self._drop_digest(block)

    def check(self) -> None:
        """Raise AssertionError unless the counts, states and digests agree."""
        held = sum(count > 0 for count in self._references)
        assert held == self._num_held, f"{held} blocks are referenced, {self._num_held} counted"
        assert self._state.count(HELD) == held, "a block's state and its reference count disagree"
        assert self._state.count(CACHED) == len(self._oldest_cached), "cached blocks are miscounted"
        assert {d: b for b, d in self._digest_of.items()} == self._block_of, "digests and blocks disagree"

    def _hold(self, block: int) -> int:
        if self._references[block] == 0:
            self._num_held += 1
            self._oldest_cached.pop(block, None)
            self._state[block] = HELD
        self._references[block] += 1
        return block

    def _is_blank(self, block: int) -> bool:
        return 0 <= block < self.num_blocks and self._state[block] in (FREE, ASIDE)

    def _start_of_run(self, count: int, room: int) -> int:
        """Where `count` free blocks stand together, with `room` behind them if possible; else -1.

        Cached blocks are given up for it, oldest first, but not many more than are needed.
        """
        for length in (count + room, count):  # FREE is 0, so a run of free blocks is a run of zero bytes
            start = self._state.find(bytes(length))
            if start >= 0:
                return start
        for block in list(self._oldest_cached)[: 2 * count]:
            self._drop_digest(block)
        return self._state.find(bytes(count))

    def _any_block(self) -> int:
        for state in (FREE, ASIDE):
            block = self._state.find(state)
            if block >= 0:
                return block
        block = next(iter(self._oldest_cached))
        self._drop_digest(block)
        return block

    def _drop_digest(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        if self._state[block] == CACHED:
            del self._oldest_cached[block]
            self._state[block] = FREE

    def _set_aside(self, start: int, room: int) -> None:
        for block in range(start, min(start + room, self.num_blocks)):
            if self._state[block] != FREE:
                break
            self._state[block] = ASIDE

    def _unset_aside(self, start: int) -> None:
        for block in range(start, self.num_blocks):
            if self._state[block] != ASIDE:
                break
            self._state[block] = FREE
