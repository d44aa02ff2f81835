"""The suffix index against a naive search, and what is drafted from it."""

from __future__ import annotations

import sys
from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skippy.engine.drafters import suffix
from skippy.engine.drafters.suffix import (
    MAX_DRAFT,
    MAX_MATCH,
    MAX_OCCURRENCES,
    SIZES,
    SharedOutputs,
    SuffixDrafter,
    SuffixIndex,
    common_suffix,
)
from skippy.engine.sequence import Sequence
from skippy.engine.types import Request, SamplingParams


@pytest.fixture(autouse=True)
def as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "MIN_REACH", 0.2)


def sequence_of(*tokens: int, prompt_len: int = 1) -> Sequence:
    request = Request("r", tokens[:prompt_len], SamplingParams(max_tokens=10_000))
    return Sequence(request, 0, 0, "suffix", 4, False, frozenset(), list(tokens))


def naive_search(tokens: list[int], text: list[int]) -> tuple[int, list[int]]:
    """The longest suffix of `text` that ends in `tokens` before their last one, and all its ends."""
    lengths = {end: common_suffix(tokens, end, text) for end in range(1, len(tokens))}
    best = max(lengths.values(), default=0)
    if best < SIZES[-1]:
        return 0, []
    return best, [end for end in reversed(lengths) if lengths[end] == best]


few_tokens = st.lists(st.integers(0, 2), max_size=60)


class TestIndex:
    @settings(derandomize=True, deadline=None, max_examples=400)
    @given(pieces=st.lists(few_tokens, max_size=4), text=few_tokens)
    @example(pieces=[[0] * 60], text=[0] * 60)
    def test_it_equals_the_naive_search_among_the_latest(self, pieces: list[list[int]], text: list[int]) -> None:
        """With as many occurrences as there may be; grown in pieces, as a sequence grows."""
        index = SuffixIndex([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suffix, "MAX_OCCURRENCES", 1000)
            for piece in pieces:
                index.tokens += piece
                index.update()
                assert index.longest(text) == naive_search(index.tokens, text)
                assert index.longest(index.tokens) == naive_search(index.tokens, index.tokens)

    def test_only_the_latest_occurrences_are_looked_at(self) -> None:
        index = SuffixIndex([5, 1, 2, *([6, 1, 2] * MAX_OCCURRENCES), 7])
        index.update()
        assert index.longest([5, 1, 2]) == (2, [3 * n for n in range(MAX_OCCURRENCES + 1, 1, -1)])

    def test_a_long_repetition_is_found_behind_many_short_ones(self) -> None:
        long = list(range(10, 22))
        index = SuffixIndex([*long, *([99, *long[-2:]] * 50), 7])
        index.update()
        assert index.longest(long) == (len(long), [len(long)])

    def test_matches_longer_than_the_limit_are_not_told_apart(self) -> None:
        index = SuffixIndex([*range(40), 0, 50, *range(MAX_MATCH), 60])
        index.update()
        text = [*range(100, 140), *range(MAX_MATCH)]
        assert index.longest(text) == (MAX_MATCH, [42 + MAX_MATCH, MAX_MATCH])

    def test_of_a_long_prompt_the_end_is_indexed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suffix, "MAX_INDEXED", 50)
        index = SuffixIndex(list(range(200)))
        index.update()
        assert index.longest([*range(170, 180)]) == (10, [180])
        assert index.longest([*range(100, 110)]) == (0, [])
        index.tokens += range(300, 400)
        index.update()
        assert index.longest([*range(170, 180)]) == (10, [180]), "what was indexed stays so"
        assert index.longest([*range(352, 360)]) == (8, [260])

    def test_hashes_that_collide_are_no_match(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suffix, "hash", lambda _: 1, raising=False)
        index = SuffixIndex([1, 2, 3, 4, 5])
        index.update()
        assert index.longest([8, 9]) == (0, [])
        assert index.longest([3, 4]) == (2, [4])

    def test_an_update_costs_what_was_appended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        index = SuffixIndex(list(range(1000)))
        index.update()
        hashed: list[object] = []

        def watched(key: object) -> int:
            hashed.append(key)
            return hash(key)

        monkeypatch.setattr(suffix, "hash", watched, raising=False)
        index.tokens += [1, 2, 3]
        index.update()
        assert len(hashed) == 3 * len(SIZES)


class TestSharedOutputs:
    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(st.lists(st.lists(st.integers(0, 9), max_size=50), max_size=40))
    def test_it_is_bounded_and_keeps_the_latest(self, outputs: list[list[int]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suffix, "SHARED_TOKENS", 64)
            shared = SharedOutputs()
            for output in outputs:
                shared.add(output)
                young, old = shared.generations
                assert len(young) + len(old) <= 64
                assert young.tokens[-len(output[-31:]) - 1 :] == [*output[-31:], -1]
                for index in (young, old):
                    for chains in index._chains:
                        assert len(chains._last) <= len(chains._previous) <= max(1, len(index))

    def test_its_memory_is_as_stated(self) -> None:
        """About 600 bytes a token: a dictionary's entry, a key and a place for each n-gram, and a link."""
        shared = SharedOutputs()
        for start in (0, 8000):  # no n-gram twice: the most there can be
            shared.add(range(start, start + 8000))
        index = shared.generations[0]
        size = sys.getsizeof(index.tokens)
        for chains in index._chains:
            size += sys.getsizeof(chains._last) + sys.getsizeof(chains._previous)
            size += sum(sys.getsizeof(key) + sys.getsizeof(end) for key, end in chains._last.items())
        assert 200 < size / len(index) < 600


class TestDrafts:
    def draft(self, *tokens: int, limit: int = 4) -> list[int]:
        return SuffixDrafter(None).look_up(sequence_of(*tokens), limit).draft

    def test_what_followed_the_longest_suffix_follows_again(self) -> None:
        assert self.draft(1, 2, 3, 4, 9, 3, 5, 2, 3)[:1] == [4]
        assert self.draft(7, 1, 2, 8, 8, 6, 1, 2, 9, 9, 7, 1, 2)[:1] == [8], "the longest, not the latest"
        assert self.draft(1, 2, 3, 4) == []

    def test_the_majority_decides_then_the_latest(self) -> None:
        three = [5, 1, 2, 3, 6, 1, 2, 3, 7, 1, 2, 4, 8, 1, 2]
        assert self.draft(*three)[:1] == [3]
        assert self.draft(5, 1, 2, 3, 6, 1, 2, 4, 8, 1, 2)[:1] == [4]

    def test_a_loop_goes_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suffix, "MIN_REACH", 0.0)
        assert self.draft(1, 2, 3, 1, 2, 3, 1, 2, limit=7) == [3, 1, 2, 3, 1, 2, 3]
        assert self.draft(5, 5, 5, limit=3) == [5, 5, 5]

    def test_limits_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suffix, "MIN_REACH", 0.0)
        for limit in (0, 1, MAX_DRAFT, MAX_DRAFT + 5):
            assert len(self.draft(1, 2, 1, 2, limit=limit)) == min(limit, MAX_DRAFT)

    def test_a_draft_ends_where_it_is_hardly_reached(self) -> None:
        """With nothing known each token is worth a half: a half and a quarter suffice, an eighth does not."""
        assert self.draft(1, 2, 3, 4, 5, 6, 1, 2) == [3, 4]
        lookup = SuffixDrafter(None).look_up(sequence_of(1, 2, 3, 4, 5, 6, 1, 2), 4)
        assert lookup.promise == pytest.approx(0.5 + 0.25)

    def test_drafts_grow_while_they_are_right_and_stop_while_they_are_wrong(self) -> None:
        drafter = SuffixDrafter(None)
        good = sequence_of(*range(1, 9), *range(1, 9))
        lengths = []
        for _ in range(20):
            lengths.append(len(drafter.look_up(good, MAX_DRAFT).draft))
            good.tokens.append(good.tokens[-8])
        assert lengths[0] < lengths[-1]
        bad = sequence_of(1)
        for token in range(100, 160):
            bad.tokens += [1, 2]
            drafter.look_up(bad, MAX_DRAFT)
            bad.tokens += [token]
        bad.tokens += [1, 2]
        assert drafter.look_up(bad, MAX_DRAFT).draft == [], "matches of two tokens"
        assert len(drafter.look_up(good, MAX_DRAFT).draft) > 4, "long ones are none the worse"

    def test_every_sequence_has_its_own_limit(self) -> None:
        sequences = [sequence_of(1, 2, 3, 1, 2), sequence_of(4, 5, 4, 5), sequence_of(6, 7, 8)]
        assert SuffixDrafter(None).propose(sequences, [1, 2, 4]) == [[3], [4, 5], []]


class TestSharing:
    TEXT = (1, 10, 11, 12, 13, 14)

    def after_another(self, shared: SharedOutputs | None) -> list[int]:
        drafter = SuffixDrafter(shared)
        first = sequence_of(*self.TEXT, prompt_len=1)
        drafter.look_up(first, 4)
        drafter.release(first)
        return drafter.look_up(sequence_of(2, 10, 11), 4).draft

    def test_outputs_that_ended_are_drafted_from(self) -> None:
        assert self.after_another(SharedOutputs()) == [12, 13]

    def test_apart_nothing_of_another_request_is_drafted(self) -> None:
        assert self.after_another(None) == []

    def test_a_prompt_is_not_shared(self) -> None:
        drafter = SuffixDrafter(SharedOutputs())
        first = sequence_of(*self.TEXT, prompt_len=len(self.TEXT))
        drafter.look_up(first, 4)
        drafter.release(first)
        assert drafter.look_up(sequence_of(2, 10, 11), 4).draft == []

    def test_a_draft_ends_with_the_output_it_is_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suffix, "MIN_REACH", 0.0)
        shared = SharedOutputs()
        shared.add([10, 11, 12])
        shared.add([13, 14])
        drafter = SuffixDrafter(shared)
        assert drafter.look_up(sequence_of(2, 10, 11), 9).draft == [12]
        assert drafter.look_up(sequence_of(2, 11, 12), 9).draft == []

    def test_its_own_text_goes_before_others(self) -> None:
        shared = SharedOutputs()
        shared.add([10, 11, 77])
        assert SuffixDrafter(shared).look_up(sequence_of(10, 11, 55, 10, 11), 1).draft == [55]

    def test_what_has_ended_is_forgotten(self) -> None:
        drafter = SuffixDrafter(SharedOutputs())
        for _ in range(3):
            sequence = sequence_of(1, 2, 3, 1, 2)
            drafter.look_up(sequence, 4)
            drafter.release(sequence)
            drafter.release(sequence)
        assert (drafter._own, drafter._calibration._open) == ({}, {})


def test_links_are_four_bytes() -> None:
    assert array("i").itemsize == 4
