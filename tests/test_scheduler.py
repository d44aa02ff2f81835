"""The scheduler, driven by an engine without a model.

The simulated engine remembers, for every slot of the pool, the tokens that its KV would
have been computed from. So each step can check that whatever a sequence is said to have
cached was computed from its own tokens, whoever computed it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippy.engine.blocks import BlockAllocator
from skippy.engine.errors import InvalidRequest
from skippy.engine.scheduler import PROMPT_LOGPROB_ROWS, Schedule, Scheduler, Work
from skippy.engine.sequence import Sequence
from skippy.engine.types import Request, SamplingParams

_names = count()


def make_request(prompt: list[int], max_tokens: int, n: int = 1, prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return Request(f"r{next(_names)}", tuple(prompt), params, n)


def make_sequences(request: Request, max_draft: int = 4, *, rides: bool = False) -> list[Sequence]:
    """The choices of a request as the engine makes them: the first leads."""
    sequences: list[Sequence] = []
    for index in range(request.n):
        leader = sequences[0] if sequences else None
        tokens = list(request.prompt_token_ids)
        sequence = Sequence(request, index, 0, "any", max_draft, False, frozenset(), tokens, rides, leader=leader)
        sequences.append(sequence)
    return sequences


class Simulation:
    """An engine around a scheduler: it computes whatever is scheduled, and accepts drafts at random.

    Args:
        rides: whether the sequences' drafts are made by rows that ride in the verify pass.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_rows: int,
        caching: bool,
        seed: int = 0,
        rides: bool = False,
    ) -> None:
        self.blocks = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(self.blocks, block_size, max_num_seqs, max_rows, caching)
        self.block_size, self.max_num_seqs, self.max_rows = block_size, max_num_seqs, max_rows
        self.random = random.Random(seed)
        self.rides, self.caching = rides, caching
        self.history: list[list[tuple[int, int, int]]] = []
        self.slots: dict[int, tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.preemptions = 0

    def add(self, request: Request, max_draft: int = 4) -> list[Sequence]:
        sequences = make_sequences(request, max_draft, rides=self.rides)
        for sequence in sequences:
            self.scheduler.add(sequence)
        self.live += sequences
        return sequences

    def finish(self, sequence: Sequence, reason: str = "length") -> None:
        sequence.finish_reason = reason  # type: ignore[assignment]
        self.scheduler.remove(sequence)
        self.live.remove(sequence)
        self.finished.append(sequence)

    def step(self) -> Schedule:
        known_before = {id(s): list(s.tokens) for s in self.live}
        running_before = list(self.scheduler.running)
        decoding_before = [sequence for sequence in running_before if sequence.decoding]
        held_before = sum(len(sequence.table) for sequence in running_before)
        prefills = self.scheduler.prefills_next
        schedule = self.scheduler.schedule()
        self.preemptions += schedule.preempted
        self.check(schedule, running_before)
        prefilled = not all(work.sequence in decoding_before for work in schedule.work)
        if not prefills and not self.caching:  # a cached prefix lets in what would not fit without
            assert not prefilled
        if prefills and not schedule.preempted and sum(len(s.table) for s in running_before) == held_before:
            assert prefilled, "it was foretold, and decoding took no block"
        for sequence in self.live:
            assert sequence.tokens == known_before[id(sequence)], "scheduling changes no token"
        self.history.append([(work.start, work.num_known, work.lookahead) for work in schedule.work])
        for work in schedule.work:
            self.compute(work)
            held = len(work.sequence.table)
            assert held <= -(-len(work.sequence.tokens) // self.block_size), "blocks of lookahead alone go back"
        self.blocks.check()
        return schedule

    def check(self, schedule: Schedule, running_before: list[Sequence]) -> None:
        running = self.scheduler.running
        assert schedule.work or not self.live, "there is always something to do"
        assert [work.sequence for work in schedule.work] == running, "every running sequence gets its turn, in order"
        assert all(work.num_known >= 1 for work in schedule.work), "nobody starves"
        assert len(running) <= self.max_num_seqs
        assert sum(work.num_slots for work in schedule.work) <= self.max_rows
        assert len({*map(id, running), *map(id, self.scheduler.waiting)}) == len(self.live)
        kept = [s for s in running_before if s in running]
        assert kept == running_before[: len(kept)], "the newest are preempted first"
        if len(kept) < len(running_before):
            assert schedule.preempted == len(running_before) - len(kept)
            assert running == kept, "nobody is admitted in a step that preempts"
        for sequence in self.scheduler.waiting:
            assert sequence.computed == 0
            assert sequence.table == []
        for work in schedule.work:
            sequence = work.sequence
            assert work.start == sequence.computed
            assert work.start + work.num_known <= len(sequence.tokens)
            end = work.start + work.num_known + work.lookahead
            slots = len(sequence.table) * self.block_size
            assert work.start + work.num_slots <= slots, "blocks are held for all that may be written"
            if work.riders:
                assert sequence.rides
                assert work.chooses
                assert work.riders <= sequence.max_draft
                assert len(sequence.tokens) + 1 + work.riders <= sequence.max_len - 1, "no more than can be drafted"
            if work.lookahead:
                assert work.start == len(sequence.tokens) - 1
                assert work.lookahead <= sequence.max_draft
                assert not sequence.rides or work.lookahead <= sequence.ridden, "nobody drafts but who rode"
                assert end <= sequence.max_len - 1, "the last token is the verifier's own"
            for position in range(work.start):
                assert self.slots[self.slot(sequence, position)] == tuple(sequence.tokens[: position + 1])

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.table[position // self.block_size] * self.block_size + position % self.block_size

    def compute(self, work: Work) -> None:
        sequence = work.sequence
        draft = [-self.random.randrange(9) for _ in range(self.random.randint(0, work.lookahead))]
        history = (*sequence.tokens, *draft)
        for position in range(work.start, work.start + work.num_known + len(draft)):
            self.slots[self.slot(sequence, position)] = history[: position + 1]
        scratch = work.start + work.num_known + len(draft)
        for position in range(scratch, scratch + work.riders * (len(draft) + 1)):
            self.slots[self.slot(sequence, position)] = ()
        chooses, room = work.chooses, sequence.max_len - len(sequence.tokens)
        if not chooses or room == 0:
            self.scheduler.commit(sequence, work.start + work.num_known)
        else:
            accepted = self.random.randint(0, len(draft))
            sequence.tokens += [*draft[:accepted], self.random.randrange(3)]
            self.scheduler.commit(sequence, work.start + work.num_known + accepted)
            room -= accepted + 1
        sequence.ridden = work.riders
        if chooses and room == 0:
            self.finish(sequence)

    def run(self, max_steps: int) -> None:
        for _ in range(max_steps):
            if not self.live:
                break
            self.step()
        assert not self.live, "not finished in time"
        assert self.blocks.num_held == 0, "idle, and blocks are held"


class AllRode(Simulation):
    """As if there had been seats for all riders of the step before."""

    def compute(self, work: Work) -> None:
        super().compute(work)
        work.sequence.ridden = work.sequence.max_draft


@dataclass(frozen=True)
class Plan:
    """A request and when it arrives; perhaps it is given up again."""

    arrives: int
    prompt: list[int]
    max_tokens: int
    n: int
    prompt_logprobs: int | None
    max_draft: int
    aborted_after: int | None


def serve(engine: Simulation, requests: list[Plan]) -> None:
    """Run an engine dry, whose requests arrive as planned. Those that never fit are refused, the others finish."""
    aborts: list[tuple[int, Sequence]] = []
    admitted = refused = 0
    for step in range(13):
        for plan in (plan for plan in requests if plan.arrives == step):
            request = make_request(plan.prompt, plan.max_tokens, plan.n, plan.prompt_logprobs)
            slots = max(len(plan.prompt), len(plan.prompt) + plan.max_tokens - 1)
            if slots > engine.blocks.num_blocks * engine.block_size:
                with pytest.raises(InvalidRequest):
                    engine.add(request, plan.max_draft)
                refused += plan.n
                continue
            sequences = engine.add(request, plan.max_draft)
            admitted += plan.n
            if plan.aborted_after is not None:
                aborts += [(step + plan.aborted_after, sequence) for sequence in sequences]
        for _, sequence in (entry for entry in aborts if entry[0] <= step):
            if sequence in engine.live:
                engine.finish(sequence, "abort")
        engine.step()
    # The oldest running sequence is never preempted, so each step brings one sequence one row nearer its end.
    engine.run(sum(s.max_len for s in engine.live) + 1)

    assert len(engine.finished) == admitted == sum(plan.n for plan in requests) - refused
    for sequence in engine.finished:
        assert sequence.finish_reason == "abort" or len(sequence.tokens) == sequence.max_len


plans = st.builds(
    Plan,
    arrives=st.integers(0, 12),
    # Few tokens, so that prompts share prefixes.
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
    max_tokens=st.integers(0, 12),
    n=st.integers(1, 3),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    max_draft=st.integers(0, 5),
    aborted_after=st.none() | st.integers(0, 10),
)


sizes = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(4, 30),
        "block_size": st.integers(1, 4),
        "max_num_seqs": st.integers(1, 5),
        "seed": st.integers(0, 2**16),
    }
)
spare_rows = st.integers(0, 12)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    requests=st.lists(plans, min_size=1, max_size=8),
    sizes=sizes,
    spare_rows=spare_rows,
    caching=st.booleans(),
    rides=st.booleans(),
)
def test_whatever_comes_every_step_is_lawful_and_everything_finishes(
    *, requests: list[Plan], sizes: dict[str, int], spare_rows: int, caching: bool, rides: bool
) -> None:
    max_rows = sizes["max_num_seqs"] + spare_rows
    serve(Simulation(max_rows=max_rows, caching=caching, rides=rides, **sizes), requests)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(requests=st.lists(plans, min_size=1, max_size=8), sizes=sizes, spare_rows=spare_rows)
def test_riders_change_nothing_for_what_runs_or_waits(
    *, requests: list[Plan], sizes: dict[str, int], spare_rows: int
) -> None:
    """Without a prefix cache, that is: blocks they are given for a step may have been the oldest in it."""
    histories = []
    for rides in (False, True):
        engine = AllRode(max_rows=sizes["max_num_seqs"] + spare_rows, caching=False, rides=rides, **sizes)
        serve(engine, requests)
        histories.append((engine.history, engine.preemptions))
    assert histories[0] == histories[1]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [1000 * salt + i for i in range(length)]


def engine_with(**changes: Any) -> Simulation:
    sizes: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_rows": 16, "caching": True}
    return Simulation(**{**sizes, **changes})


def rows_of(schedule: Schedule) -> list[int]:
    return [work.num_known for work in schedule.work]


class TestAdmission:
    def test_what_never_fits_is_refused_at_once(self) -> None:
        engine = engine_with(num_blocks=4)
        with pytest.raises(InvalidRequest, match=r"need 5 KV blocks of 4 tokens.*has 4") as caught:
            engine.add(make_request(prompt_of(10), 8))
        assert caught.value.param == "max_tokens"
        assert not engine.scheduler.waiting

    def test_the_last_token_needs_no_slot(self) -> None:
        engine = engine_with(num_blocks=4)
        engine.add(make_request(prompt_of(10), 7))
        engine.run(20)
        assert len(engine.finished) == 1

    def test_places_are_limited(self) -> None:
        engine = engine_with(max_num_seqs=2)
        for salt in range(3):
            engine.add(make_request(prompt_of(2, salt), 3))
        assert len(engine.step().work) == 2
        assert len(engine.scheduler.waiting) == 1

    def test_a_step_with_prompts_is_foretold(self) -> None:
        engine = engine_with(max_num_seqs=2, max_rows=4)
        for salt in range(3):
            engine.add(make_request(prompt_of(6, salt), 3))
        foretold = []
        while engine.live:
            foretold.append(engine.scheduler.prefills_next)
            starts = [work.start for work in engine.step().work if work.num_known > 1 or not work.start]
            assert bool(starts) == foretold[-1]
        assert {True, False} == set(foretold)

    def test_what_waits_for_a_place_or_for_blocks_is_not_foretold(self) -> None:
        for limits in ({"max_num_seqs": 1}, {"num_blocks": 3}):
            engine = engine_with(**limits)
            for salt in range(2):
                engine.add(make_request(prompt_of(8, salt), 4))
            assert engine.scheduler.prefills_next
            engine.step()
            assert len(engine.scheduler.waiting) == 1
            assert not engine.scheduler.prefills_next

    def test_first_come_first_served(self) -> None:
        engine = engine_with(max_num_seqs=1)
        added = [engine.add(make_request(prompt_of(2, salt), 2))[0] for salt in range(3)]
        engine.run(20)
        assert engine.finished == added

    def test_without_blocks_for_the_whole_prompt_it_waits_and_holds_nothing(self) -> None:
        engine = engine_with(num_blocks=4)
        engine.add(make_request(prompt_of(8), 4))
        blocked = engine.add(make_request(prompt_of(8, salt=1), 4))[0]
        engine.step()
        engine.step()
        assert list(engine.scheduler.waiting) == [blocked]
        assert blocked.table == []


class TestRows:
    def test_a_prompt_is_computed_in_chunks(self) -> None:
        engine = engine_with(max_rows=16)
        engine.add(make_request(prompt_of(40), 1))
        assert [rows_of(engine.step()) for _ in range(3)] == [[16], [16], [8]]
        assert not engine.live

    def test_decoding_goes_on_beside_a_prompt(self) -> None:
        engine = engine_with(max_rows=16)
        engine.add(make_request(prompt_of(4), 9), max_draft=0)
        engine.step()
        engine.add(make_request(prompt_of(40, salt=1), 2))
        assert [rows_of(engine.step()) for _ in range(3)] == [[1, 15], [1, 15], [1, 10]]

    def test_a_long_prompt_leaves_a_row_for_everyone_behind_it(self) -> None:
        engine = engine_with(max_rows=8)
        engine.add(make_request(prompt_of(30), 2))
        engine.step()
        # Recomputed after preemption, an old sequence can be long again with others running behind it.
        engine.scheduler.running[0].computed = 0
        for salt in (1, 2):
            engine.scheduler.running += engine.add(make_request(prompt_of(1, salt), 2))
            engine.scheduler.waiting.pop()
        assert rows_of(engine.step()) == [6, 1, 1]

    @pytest.mark.parametrize(("decoding", "max_rows", "left"), [(7, 32, 25), (4, 8, 4), (5, 6, 1)])
    def test_drafts_leave_a_prompt_half_of_what_decoding_leaves(self, decoding: int, max_rows: int, left: int) -> None:
        """And so it is let in, however many decode."""
        engine = engine_with(num_blocks=100, max_num_seqs=decoding + 1, max_rows=max_rows)
        for salt in range(decoding):
            engine.add(make_request(prompt_of(1, salt), 60), max_draft=16)
        while not all(sequence.decoding for sequence in engine.live):
            engine.step()
        engine.add(make_request(prompt_of(60, salt=9), 2))
        for _ in range(2):
            work = engine.step().work
            assert [one.num_known for one in work[:-1]] == [1] * decoding
            assert work[-1].num_known >= left / 2
            assert sum(one.lookahead for one in work) >= (left - 1) // 2

    def test_drafts_preempt_nobody(self) -> None:
        engine = engine_with(num_blocks=4)
        for salt in range(2):
            engine.add(make_request(prompt_of(7, salt), 8), max_draft=4)
        engine.step()
        schedule = engine.scheduler.schedule()
        assert schedule.preempted == 0, "the eighth token still has a slot"
        assert [(work.num_known, work.lookahead) for work in schedule.work] == [(1, 0), (1, 0)]

    def test_lookahead_shares_the_rows(self) -> None:
        engine = engine_with(max_rows=8)
        for salt in range(3):
            engine.add(make_request(prompt_of(1, salt), 20), max_draft=4)
        engine.step()
        assert [work.lookahead for work in engine.scheduler.schedule().work] == [1, 2, 2]

    @pytest.mark.parametrize(("left", "lookahead"), [(1, 0), (2, 1), (3, 2), (20, 4)])
    def test_lookahead_ends_one_before_the_last_token(self, left: int, lookahead: int) -> None:
        engine = engine_with()
        engine.add(make_request(prompt_of(4), 1 + left), max_draft=4)
        engine.step()
        assert [work.lookahead for work in engine.scheduler.schedule().work] == [lookahead]

    def test_nothing_is_drafted_before_the_prompt_is_computed(self) -> None:
        engine = engine_with()
        engine.add(make_request(prompt_of(17), 4), max_draft=4)
        assert engine.step().work[0].lookahead == 0
        assert engine.step().work[0].lookahead == 0, "one prompt token left is no newest token"
        assert engine.step().work[0].lookahead > 0


class TestRiders:
    """Rows of a fused drafter: w of them ride behind each of g + 1 rows that choose."""

    @staticmethod
    def riders_of(schedule: Schedule) -> list[int]:
        return [work.riders for work in schedule.work]

    def test_they_ride_behind_every_row_that_chooses(self) -> None:
        engine = engine_with(max_rows=64, rides=True)
        engine.add(make_request(prompt_of(6), 40), max_draft=4)
        first, second = engine.step().work + engine.step().work
        assert (first.num_known, first.lookahead, first.num_riders) == (6, 0, 4), "the prompt's last row chooses"
        assert (second.num_known, second.lookahead, second.num_riders) == (1, 4, 20)

    def test_not_behind_a_chunk_that_ends_before(self) -> None:
        engine = engine_with(max_rows=16, rides=True)
        engine.add(make_request(prompt_of(20), 40), max_draft=4)
        assert [self.riders_of(engine.step()) for _ in range(2)] == [[0], [4]]

    def test_others_have_none(self) -> None:
        engine = engine_with(max_rows=64)
        engine.add(make_request(prompt_of(6), 40), max_draft=4)
        assert [self.riders_of(engine.step()) for _ in range(2)] == [[0], [0]]

    @pytest.mark.parametrize(("max_rows", "riders"), [(25, 4), (24, 3), (10, 1), (9, 0)])
    def test_as_many_as_there_are_rows_for(self, max_rows: int, riders: int) -> None:
        engine = engine_with(max_rows=max_rows, rides=True)
        engine.add(make_request(prompt_of(1), 40), max_draft=4)
        engine.step()
        assert self.riders_of(engine.scheduler.schedule()) == [riders]

    def test_known_and_drafted_tokens_of_all_come_first(self) -> None:
        engine = engine_with(max_rows=16, rides=True)
        engine.add(make_request(prompt_of(1), 40), max_draft=1)
        engine.step()
        engine.add(make_request(prompt_of(13, salt=1), 40), max_draft=1)
        schedule = engine.step()
        assert (rows_of(schedule), self.riders_of(schedule)) == ([1, 13], [0, 1])

    @pytest.mark.parametrize(
        ("length", "num_blocks", "riders"), [(8, 4, [0, 0]), (8, 5, [2, 0]), (7, 4, [1, 1]), (7, 6, [2, 2])]
    )
    def test_as_many_as_there_are_blocks_for_and_nobody_is_preempted(
        self, length: int, num_blocks: int, riders: list[int]
    ) -> None:
        engine = engine_with(num_blocks=num_blocks, max_rows=64, rides=True)
        for salt in (1, 2):
            engine.add(make_request(prompt_of(length, salt), 4), max_draft=4)
        schedule = engine.step()
        assert (rows_of(schedule), schedule.preempted) == ([length, length], 0)
        assert self.riders_of(schedule) == riders

    def test_their_blocks_go_back_after_the_step(self) -> None:
        engine = engine_with(max_rows=64, rides=True)
        (sequence,) = engine.add(make_request(prompt_of(4), 40), max_draft=4)
        schedule = engine.scheduler.schedule()
        assert len(sequence.table) == 2
        engine.compute(schedule.work[0])
        assert len(sequence.table) == 2, "the newest token's block stays"
        schedule = engine.scheduler.schedule()
        assert len(sequence.table) == -(-(4 + 5 + 20) // 4)
        engine.compute(schedule.work[0])
        assert len(sequence.table) == -(-len(sequence.tokens) // 4)

    @pytest.mark.parametrize(("left", "riders"), [(1, 0), (2, 0), (3, 1), (4, 2), (40, 4)])
    def test_no_more_than_the_next_step_can_draft(self, left: int, riders: int) -> None:
        engine = engine_with(max_rows=64, rides=True)
        engine.add(make_request(prompt_of(4), left), max_draft=4)
        assert self.riders_of(engine.scheduler.schedule()) == [riders]

    def test_an_adaptive_sequence_has_as_many_as_the_step_is_wide(self) -> None:
        engine = engine_with(max_rows=64, rides=True)
        (sequence,) = engine.add(make_request(prompt_of(4), 40), max_draft=4)
        sequence.adaptive = True
        engine.step()
        assert [self.riders_of(engine.scheduler.schedule({sequence.drafter: width})) for width in (0, 2, 9)] == [
            [0],
            [2],
            [4],
        ]

    def test_what_could_fit_alone_without_them_is_admitted(self) -> None:
        engine = engine_with(num_blocks=4, max_rows=64, rides=True)
        engine.add(make_request(prompt_of(10), 7), max_draft=4)
        engine.run(20)
        assert len(engine.finished) == 1


class TestLogitRows:
    """Which rows of a piece of work reach lm_head."""

    def sequence(self, prompt_logprobs: int | None) -> Sequence:
        sequence = make_sequences(make_request(prompt_of(10), 5, prompt_logprobs=prompt_logprobs))[0]
        sequence.tokens += [7]
        return sequence

    def test_a_chunk_that_ends_before_the_newest_token_shows_its_last_row(self) -> None:
        assert Work(self.sequence(None), start=0, num_known=10, lookahead=0).num_logits(0) == 1

    def test_the_newest_token_and_the_drafted_ones_need_one_each(self) -> None:
        work = Work(self.sequence(None), start=4, num_known=7, lookahead=3)
        assert work.chooses
        assert work.num_logits(2) == 3

    def test_prompt_logprobs_need_one_for_every_row_of_the_prompt(self) -> None:
        sequence = self.sequence(0)
        assert Work(sequence, start=0, num_known=8, lookahead=0).num_logits(0) == 8
        assert Work(sequence, start=10, num_known=1, lookahead=2).num_logits(2) == 3, "the prompt is past"

    def test_prompt_logprobs_come_in_chunks(self) -> None:
        length = PROMPT_LOGPROB_ROWS * 2 + 5
        engine = engine_with(max_rows=1000)
        engine.add(make_request(prompt_of(length), 2, prompt_logprobs=1))
        assert [rows_of(engine.step()) for _ in range(3)] == [[PROMPT_LOGPROB_ROWS], [PROMPT_LOGPROB_ROWS], [5]]


class TestPreemption:
    def crowded(self) -> tuple[Simulation, Sequence, Sequence]:
        """Two sequences that fit now and not for long."""
        engine = engine_with(num_blocks=5, caching=False)
        old, new = (engine.add(make_request(prompt_of(7, salt), 10), max_draft=0)[0] for salt in (1, 2))
        engine.step()
        assert engine.scheduler.running == [old, new]
        return engine, old, new

    def test_the_newest_starts_over_and_keeps_its_tokens(self) -> None:
        engine, old, new = self.crowded()
        while not engine.preemptions:
            tokens = list(new.tokens)
            engine.step()
        assert engine.scheduler.running == [old]
        assert list(engine.scheduler.waiting) == [new]
        assert (new.computed, new.published, new.table) == (0, 0, [])
        assert new.tokens == tokens
        assert new.num_output > 0

    def test_it_goes_on_when_there_is_space(self) -> None:
        engine, old, new = self.crowded()
        engine.run(100)
        assert engine.finished == [old, new]
        assert engine.preemptions == 1

    def test_it_is_first_in_the_queue(self) -> None:
        engine, _, new = self.crowded()
        late = engine.add(make_request(prompt_of(7, salt=3), 1))[0]
        while not engine.preemptions:
            engine.step()
        assert list(engine.scheduler.waiting) == [new, late]

    def test_a_preempted_sequence_can_be_aborted(self) -> None:
        engine, old, new = self.crowded()
        while not engine.preemptions:
            engine.step()
        engine.finish(new, "abort")
        engine.run(100)
        assert engine.finished == [new, old]


class TestPrefixCaching:
    def test_a_second_prompt_reuses_full_blocks(self) -> None:
        engine = engine_with()
        engine.add(make_request(prompt_of(10), 1))
        engine.run(5)
        second = engine.add(make_request([*prompt_of(8), 77, 78, 79], 1))[0]
        assert rows_of(engine.step()) == [3]
        assert second.cached_tokens == 8

    def test_the_newest_token_is_always_computed(self) -> None:
        engine = engine_with()
        for _ in range(2):
            sequence = engine.add(make_request(prompt_of(8), 1))[0]
            engine.run(5)
        assert sequence.cached_tokens == 4, "the newest token is always computed"

    def test_generated_tokens_are_reused_as_well(self) -> None:
        engine = engine_with()
        first = engine.add(make_request(prompt_of(4), 8))[0]
        engine.run(20)
        second = engine.add(make_request(first.tokens, 1))[0]
        engine.run(5)
        assert second.cached_tokens == 8, "eleven of twelve tokens were computed: two full blocks"

    def test_switched_off_nothing_is_reused(self) -> None:
        engine = engine_with(caching=False)
        for _ in range(2):
            sequence = engine.add(make_request(prompt_of(8), 1))[0]
            engine.run(5)
        assert sequence.cached_tokens == 0

    def test_prompt_logprobs_are_computed_not_cached(self) -> None:
        engine = engine_with()
        engine.add(make_request(prompt_of(8), 1))
        engine.run(5)
        engine.add(make_request(prompt_of(8), 1, prompt_logprobs=0))
        assert rows_of(engine.step()) == [8]

    def test_the_first_admission_says_what_was_cached(self) -> None:
        engine = engine_with(num_blocks=5)
        old, new = (engine.add(make_request(prompt_of(7, salt), 10), max_draft=0)[0] for salt in (1, 2))
        engine.run(100)
        assert engine.preemptions
        assert (old.cached_tokens, new.cached_tokens) == (0, 0), "finding one's own blocks again does not count"


class TestChoices:
    """`n` choices of one prompt: the first computes it, the others wait for it and share its blocks."""

    def test_siblings_wait_for_their_leader(self) -> None:
        engine = engine_with(max_rows=8)
        leader, *others = engine.add(make_request(prompt_of(14), 4, n=3))
        assert [[w.sequence for w in engine.step().work] for _ in range(2)] == [[leader], [leader]]
        schedule = engine.step()
        assert [work.sequence for work in schedule.work] == [leader, *others]
        assert [other.cached_tokens for other in others] == [12, 12]

    def test_shared_blocks_are_held_once(self) -> None:
        engine = engine_with()
        leader, *others = engine.add(make_request(prompt_of(14), 4, n=4), max_draft=0)
        engine.step()
        engine.step()
        for other in others:
            assert other.table[:3] == leader.table[:3]
            assert other.table[3] != leader.table[3], "the partial block is nobody else's"
        assert engine.blocks.num_held == 3 + len([leader, *others])

    def test_strangers_pass_siblings_that_wait(self) -> None:
        engine = engine_with(max_rows=8)
        leader, _ = engine.add(make_request(prompt_of(14), 2, n=2))
        stranger = engine.add(make_request(prompt_of(3, salt=1), 2))[0]
        engine.step()
        assert [work.sequence for work in engine.step().work] == [leader, stranger]

    def test_siblings_go_on_without_an_aborted_leader(self) -> None:
        engine = engine_with(max_rows=8)
        leader, other = engine.add(make_request(prompt_of(14), 2, n=2))
        engine.step()
        engine.finish(leader, "abort")
        engine.run(10)
        assert engine.finished == [leader, other]
        assert len(other.tokens) == other.max_len

    def test_without_caching_nobody_waits(self) -> None:
        engine = engine_with(max_rows=64, caching=False)
        engine.add(make_request(prompt_of(14), 2, n=3))
        assert rows_of(engine.step()) == [14, 14, 14]
