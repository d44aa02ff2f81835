"""The block allocator against a model of what it may and may not do."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from skippy.engine.blocks import BlockAllocator, Digest, extend_digests

BLOCK_SIZE = 2
# Few tokens and short blocks, so that prefixes coincide often.
contents = st.lists(st.integers(0, 1), min_size=BLOCK_SIZE, max_size=6 * BLOCK_SIZE)


def digests_of(tokens: list[int]) -> list[Digest]:
    digests: list[Digest] = []
    extend_digests(digests, tokens, BLOCK_SIZE, len(tokens))
    return digests


@dataclass(eq=False)
class Holder:
    """A sequence: its table, and the tokens that fill the table's blocks."""

    tokens: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)

    @property
    def digests(self) -> list[Digest]:
        return digests_of(self.tokens)


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences that grow, share, publish, forget and end, in any order."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.blocks = BlockAllocator(num_blocks)
        self.holders: list[Holder] = []
        self.published: dict[Digest, int] = {}

    @property
    def held(self) -> set[int]:
        return {block for holder in self.holders for block in holder.table}

    def pick(self, data: st.DataObject) -> Holder:
        return data.draw(st.sampled_from(self.holders))

    @rule(data=st.data(), fresh=st.booleans(), tokens=contents, room=st.integers(0, 5))
    def extend(self, data: st.DataObject, fresh: bool, tokens: list[int], room: int) -> None:
        holder = Holder() if fresh or not self.holders else self.pick(data)
        count = len(tokens) // BLOCK_SIZE
        before, held, free = list(holder.table), self.held, self.blocks.num_free

        granted = self.blocks.extend(holder.table, count, room)

        assert granted == (count <= free), "refused exactly when so many blocks are not free"
        new = holder.table[len(before) :]
        assert holder.table[: len(before)] == before, "what a table holds already stays where it is"
        assert len(new) == len(set(new)) == (count if granted else 0), "refused means that nothing changed"
        assert not held & set(new), "a held block is handed to nobody else"
        assert self.blocks.num_free == free - len(new)
        self.published = {d: block for d, block in self.published.items() if block in held or self.survives(d, block)}
        assert not set(new) & set(self.published.values()), "what is overwritten is not reused"
        del holder.tokens[len(before) * BLOCK_SIZE :]
        holder.tokens += tokens[: len(new) * BLOCK_SIZE]
        if holder.table and holder not in self.holders:
            self.holders.append(holder)

    def survives(self, digest: Digest, block: int) -> bool:
        """Whether a published block that nobody held can still be shared."""
        found = self.blocks.share([digest])
        assert found in ([block], [])
        self.blocks.release(list(found))
        return bool(found)

    @rule(tokens=contents)
    def share(self, tokens: list[int]) -> None:
        expected = []
        for digest in digests_of(tokens):
            if digest not in self.published:
                break
            expected.append(self.published[digest])
        table = self.blocks.share(digests_of(tokens))
        assert table == expected, "the longest published prefix, and nothing under another digest"
        if table:
            self.holders.append(Holder(tokens[: len(table) * BLOCK_SIZE], table))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        place = data.draw(st.integers(0, len(holder.table) - 1))
        block, digest = holder.table[place], holder.digests[place]
        self.blocks.publish(block, digest)
        if digest not in self.published and block not in self.published.values():
            self.published[digest] = block

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        doomed = holder.table[data.draw(st.integers(0, len(holder.table) - 1)) :]
        self.blocks.forget(doomed)
        self.published = {digest: block for digest, block in self.published.items() if block not in doomed}

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        self.holders.remove(holder)
        self.blocks.release(holder.table)
        assert holder.table == []

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        others = {block for other in self.holders if other is not holder for block in other.table}
        kept = others | set(self.published.values())
        least = max((place + 1 for place, block in enumerate(holder.table) if block in kept), default=0)
        count = data.draw(st.integers(least, len(holder.table)))
        before, free = list(holder.table), self.blocks.num_free

        self.blocks.trim(holder.table, count)

        assert holder.table == before[:count]
        assert self.blocks.num_free == free + len(before) - count
        del holder.tokens[count * BLOCK_SIZE :]
        if not holder.table:
            self.holders.remove(holder)

    @invariant()
    def the_books_balance(self) -> None:
        self.blocks.check()
        assert self.blocks.num_held == len(self.held)
        assert self.blocks.num_held + self.blocks.num_free == self.blocks.num_blocks
        assert self.held <= set(range(self.blocks.num_blocks))

    @invariant()
    def only_equal_prefixes_share(self) -> None:
        owners: dict[int, Digest] = {}
        for holder in self.holders:
            for block, digest in zip(holder.table, holder.digests, strict=True):
                assert owners.setdefault(block, digest) == digest

    def teardown(self) -> None:
        if not hasattr(self, "blocks"):
            return
        for holder in self.holders:
            self.blocks.release(holder.table)
        self.blocks.check()
        assert self.blocks.num_held == 0
        # Nothing is left set aside for anybody: forgotten and empty, the pool is one run again.
        everything = range(self.blocks.num_blocks)
        self.blocks.forget(everything)
        table: list[int] = []
        assert self.blocks.extend(table, len(everything))
        assert table == list(everything)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(derandomize=True, deadline=None, max_examples=150, stateful_step_count=40)


class TestContiguity:
    """Blocks of one sequence stand together, so that attention reads them without gathering."""

    def test_two_growing_sequences_do_not_interleave(self) -> None:
        blocks, one, two = BlockAllocator(16), list[int](), list[int]()
        for length in range(8):
            assert blocks.extend(one, 1, room=7 - length)
            assert blocks.extend(two, 1, room=7 - length)
        assert one == list(range(8))
        assert two == list(range(8, 16))

    def test_a_new_table_starts_where_its_room_fits(self) -> None:
        blocks, short, wall, table = BlockAllocator(12), list[int](), list[int](), list[int]()
        blocks.extend(short, 3)
        blocks.extend(wall, 1)
        blocks.release(short)
        assert blocks.extend(table, 2, room=3)
        assert table == [4, 5], "the hole of three is too small for five"

    def test_without_space_for_its_room_it_still_stands_together(self) -> None:
        blocks, hole, wall, table = BlockAllocator(6), list[int](), list[int](), list[int]()
        blocks.extend(hole, 3)
        blocks.extend(wall, 1)
        blocks.release(hole)
        assert blocks.extend(table, 2, room=4)
        assert table == [0, 1]

    def test_what_is_set_aside_is_given_away_when_there_is_nothing_else(self) -> None:
        blocks, one, two = BlockAllocator(4), list[int](), list[int]()
        blocks.extend(one, 1, room=3)
        assert blocks.extend(two, 3)
        assert sorted(one + two) == [0, 1, 2, 3]

    def test_a_trimmed_table_grows_into_the_same_blocks_again(self) -> None:
        blocks, one, two = BlockAllocator(16), list[int](), list[int]()
        blocks.extend(one, 4)
        blocks.trim(one, 1)
        assert blocks.num_held == 1
        assert blocks.extend(two, 3)
        assert two == [4, 5, 6]
        assert blocks.extend(one, 3)
        assert one == [0, 1, 2, 3]

    def test_release_ends_the_wish_for_what_was_trimmed(self) -> None:
        blocks, one, two = BlockAllocator(4), list[int](), list[int]()
        blocks.extend(one, 3)
        blocks.trim(one, 1)
        blocks.release(one)
        assert blocks.extend(two, 4)
        assert two == [0, 1, 2, 3]

    def test_a_part_that_stands_elsewhere_is_not_set_aside(self) -> None:
        blocks, one, wall, two = BlockAllocator(6), list[int](), list[int](), list[int]()
        blocks.extend(one, 1)
        blocks.extend(wall, 1)
        blocks.extend(one, 3)
        assert one == [0, 2, 3, 4]
        blocks.trim(one, 1)
        assert blocks.extend(two, 4)
        assert two == [2, 3, 4, 5]

    def test_release_ends_the_wish_for_room(self) -> None:
        blocks, one, two = BlockAllocator(4), list[int](), list[int]()
        blocks.extend(one, 1, room=3)
        blocks.release(one)
        assert blocks.extend(two, 4)
        assert two == [0, 1, 2, 3]


class TestCache:
    """Released blocks keep verified content until somebody needs the space."""

    def cached(self, blocks: BlockAllocator, *prompts: list[int]) -> None:
        for tokens in prompts:
            table: list[int] = []
            blocks.extend(table, len(tokens) // BLOCK_SIZE)
            for block, digest in zip(table, digests_of(tokens), strict=True):
                blocks.publish(block, digest)
            blocks.release(table)

    def test_a_released_prefix_is_found_again(self) -> None:
        blocks = BlockAllocator(4)
        self.cached(blocks, [1, 2, 3, 4])
        assert blocks.num_held == 0
        assert blocks.share(digests_of([1, 2, 3, 4, 5, 6])) == [0, 1]
        assert blocks.num_held == 2

    def test_the_oldest_is_overwritten_first(self) -> None:
        blocks, table = BlockAllocator(3), list[int]()
        self.cached(blocks, [1, 1], [2, 2], [3, 3])
        blocks.release(blocks.share(digests_of([1, 1])))  # used again, so [2, 2] is the oldest now
        blocks.extend(table, 1)
        found = {token: bool(blocks.share(digests_of([token, token]))) for token in (1, 2, 3)}
        # A run may cost twice as many cached blocks as it takes, and no more.
        assert found[1]
        assert not found[2]

    def test_of_one_prefix_the_tail_is_overwritten_before_the_head(self) -> None:
        blocks, table = BlockAllocator(4), list[int]()
        self.cached(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
        blocks.extend(table, 1)
        assert blocks.share(digests_of([1, 2, 3, 4])) == [0, 1]

    def test_forgotten_blocks_are_never_shared(self) -> None:
        blocks = BlockAllocator(4)
        self.cached(blocks, [1, 2, 3, 4])
        blocks.forget([1])
        assert blocks.share(digests_of([1, 2, 3, 4])) == [0]

    def test_the_first_copy_of_a_prefix_is_the_one_that_is_known(self) -> None:
        blocks, one, two = BlockAllocator(4), list[int](), list[int]()
        digest = digests_of([7, 7])[0]
        for table in (one, two):
            blocks.extend(table, 1)
            blocks.publish(table[0], digest)
        assert blocks.share([digest]) == one


class TestDigests:
    def test_a_digest_covers_all_that_precedes(self) -> None:
        one, other = digests_of([1, 2, 3, 4]), digests_of([1, 9, 3, 4])
        assert len({*one, *other}) == 4

    def test_only_full_blocks_below_the_limit_have_one(self) -> None:
        digests: list[Digest] = []
        extend_digests(digests, [1, 2, 3, 4, 5, 6], BLOCK_SIZE, 5)
        assert digests == digests_of([1, 2, 3, 4])

    def test_digests_are_extended_not_recomputed(self) -> None:
        digests = [b"kept"]
        extend_digests(digests, [1, 2, 3, 4], BLOCK_SIZE, 4)
        assert digests[0] == b"kept"
        assert len(digests) == 2
