"""Lookup first, the model's own drafts where nothing is found."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
from support_engine import write_adapter, write_checkpoint

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.drafters.suffix import MAX_DRAFT, Lookup, SuffixDrafter
from skippy.engine.sequence import Sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(base)
    return base


def sequence(*tokens: int, adaptive: bool = False) -> Sequence:
    request = Request("r", tokens, SamplingParams(max_tokens=20))
    return Sequence(
        request=request,
        index=0,
        seed=0,
        drafter="hybrid",
        max_draft=4,
        adaptive=adaptive,
        end_ids=frozenset(),
        tokens=list(tokens),
    )


class Told:
    """Says what it was asked, and has one token for everybody."""

    name = "told"

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.released: list[Sequence] = []

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        self.asked += [(s.tokens, limit) for s, limit in zip(sequences, limits, strict=True)]
        return [[90 + place] for place in range(len(sequences))]

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)

    def forget(self) -> None:
        self.released.clear()


class Silent(Told):
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [[] for _ in super().propose(sequences, limits)]


REPEATING = (*range(1, 9), *range(1, 7))


def test_the_other_drafts_only_where_nothing_repeats() -> None:
    repeating, other, third = sequence(*REPEATING), sequence(5, 6, 7), sequence(8, 9)
    told = Told()
    drafts = HybridDrafter(SuffixDrafter(None), told).propose([other, repeating, third], [4, 2, 3])
    assert drafts == [[90], [7, 8], [91]]
    assert told.asked == [(other.tokens, 4), (third.tokens, 3)]


def test_what_promises_less_than_the_others_drafts_came_to_is_not_taken() -> None:
    told = Told()
    hybrid, other = HybridDrafter(SuffixDrafter(None), told), sequence(5, 6, 7)
    repeating = sequence(*REPEATING)
    for accepted in [5] * 100:
        hybrid.propose([other], [4])
        other.last_accepted = accepted
    assert hybrid.propose([repeating], [4]) == [[90]]
    for accepted in [0] * 300:
        hybrid.propose([other], [4])
        other.last_accepted = accepted
    assert hybrid.propose([repeating], [4])[0][:2] == [7, 8]


def test_a_weak_lookup_is_better_than_nothing() -> None:
    silent = Silent()
    hybrid = HybridDrafter(SuffixDrafter(None), silent)
    hybrid._accepted = 100.0
    repeating = sequence(*REPEATING)
    assert hybrid.propose([repeating], [2]) == [[7, 8]]
    assert silent.asked == [(repeating.tokens, 2)]


def test_both_forget_what_has_ended() -> None:
    told = Told()
    lookup = SuffixDrafter(None)
    hybrid, one = HybridDrafter(lookup, told), sequence(5, 6, 7)
    hybrid.propose([one], [4])
    hybrid.release(one)
    assert told.released == [one]
    assert (hybrid._asked, lookup._own) == (set(), {})
    hybrid.forget()
    assert told.released == []


def test_a_lookup_that_saves_a_pass_may_promise_less() -> None:
    repeating, other = sequence(*REPEATING), sequence(5, 6, 7)
    for cost, taken in ((0.0, False), (2.0, True)):
        hybrid = HybridDrafter(SuffixDrafter(None), Told(), draft_cost=cost)
        for _ in range(100):
            hybrid.propose([other], [4])
            other.last_accepted = 2
        assert (hybrid.propose([repeating], [4])[0][:2] == [7, 8]) == taken


def test_what_a_pass_costs_is_timed() -> None:
    repeating, other = sequence(*REPEATING), sequence(5, 6, 7)
    hybrid = HybridDrafter(SuffixDrafter(None), Told(), draft_cost=0.1)
    for _ in range(100):
        hybrid.propose([other], [4])
        other.last_accepted = 2
    assert hybrid.propose([repeating], [4]) == [[90]]
    for _ in range(100):
        hybrid.time(verify_seconds=1e-9)
    assert hybrid.propose([sequence(*REPEATING)], [4])[0][:2] == [7, 8]


def test_the_controller_limits_what_is_not_looked_up() -> None:
    repeating = sequence(*REPEATING, adaptive=True)
    other, fixed = sequence(5, 6, 7, adaptive=True), sequence(5, 6, 7)
    told = Told()
    hybrid = HybridDrafter(SuffixDrafter(None), told, draft_cost=0.5)
    hybrid.begin(2)
    drafts = hybrid.propose([repeating, other, fixed], [2, 5, 5])
    assert drafts == [[7, 8], [90], [91]]
    assert [limit for _, limit in told.asked] == [2, 5]
    assert hybrid.free == {repeating}
    hybrid.release(repeating)
    assert hybrid.free == {repeating}, "the step that was its last one was no dearer"
    hybrid.begin(2)
    assert not hybrid.free


def test_who_asks_in_vain_has_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    hybrid = HybridDrafter(SuffixDrafter(None), told, draft_cost=0.1)
    other = sequence(5, 6, 7)
    for _ in range(100):
        hybrid.propose([other], [4])
        other.last_accepted = 3
    monkeypatch.setattr(told, "propose", lambda sequences, _limits: [[] for _ in sequences])
    assert hybrid.propose([sequence(*REPEATING)], [4])[0][:2] == [7, 8], "what was looked up is better than nothing"
    assert not hybrid.free
    other.last_accepted = 0
    for _ in range(100):
        hybrid.propose([other], [4])
    repeating = sequence(*REPEATING)
    hybrid.propose([repeating], [4])
    assert hybrid.free == {repeating}, "who always asks in vain is asked no more where something is found"


def test_where_the_others_drafts_cost_no_more_none_is_free() -> None:
    repeating = sequence(*REPEATING)
    hybrid = HybridDrafter(SuffixDrafter(None), Told())
    assert hybrid.propose([repeating], [2]) == [[7, 8]]
    assert (hybrid.free_width, hybrid.free) == (0, frozenset())


@pytest.mark.parametrize("found", [False, True])
def test_its_controller_is_shown_passes_only(folder: Path, monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16))
    controller = engine.drafting._controllers["hybrid"]
    seen: list[tuple[int, int, int]] = []

    def width(batch: int) -> int:
        assert batch == 1
        return 3

    def observe(batch: int, width: int, seconds: float, accepted: list[int], others: int) -> None:
        assert seconds > 0.0
        assert len(accepted) == batch
        seen.append((batch, width, others))

    def look_up(_self: SuffixDrafter, _sequence: Sequence, limit: int) -> Lookup:
        return Lookup([1] * limit, float(limit)) if found else Lookup([], 0.0)

    monkeypatch.setattr(SuffixDrafter, "look_up", look_up)
    monkeypatch.setattr(controller, "width", width)
    monkeypatch.setattr(controller, "observe", observe)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    engine.add(Request("0", (3, 4, 5), params, drafter="hybrid"))
    widest = 0
    while engine.has_work:
        widest = max(widest, engine.step().stats.draft_tokens)
    # The last step has no room for a draft, so nothing can be looked up.
    assert seen[:-1] == [] if found else {(1, 3, 0)} <= set(seen)
    assert widest == MAX_DRAFT if found else widest <= 3
