"""Prompt lookup against a search by brute force."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skippy.engine.drafters.ngram import MAX_MATCH, MIN_MATCH, NgramDrafter, lookup
from skippy.engine.sequence import Sequence
from skippy.engine.types import Request, SamplingParams


def brute_force(tokens: list[int], limit: int, min_match: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix, the history going round."""
    for size in range(max(MAX_MATCH, min_match), min_match - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                tail = tokens[start + size :]
                return [tail[i % len(tail)] for i in range(limit)]
    return []


# Ids whose bytes repeat across the border of two ids: a search over bytes that forgot about
# alignment would find 1 in the middle of (256, 0), and 65793 nearly everywhere.
awkward = st.sampled_from([0, 1, 256, 65536, 16777216, 65793, 16843009])


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=40) | st.lists(awkward, max_size=40),
    limit=st.integers(0, 8),
    min_match=st.integers(1, 12),
)
@example(tokens=[1, 9, 256, 0, 1], limit=2, min_match=1)
@example(tokens=[0] * 20, limit=8, min_match=2)
def test_lookup_equals_the_search_by_brute_force(tokens: list[int], limit: int, min_match: int) -> None:
    assert lookup(tokens, limit, min_match) == brute_force(tokens, limit, min_match)


@pytest.mark.parametrize(
    ("tokens", "limit", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 9, 1, 2, 4, 1, 2], 2, [4, 1]),
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, [3]),
        ([1, 2, 3, 4], 4, []),
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 1, 2], 0, []),
        ([], 4, []),
        ([1], 4, []),
    ],
    ids=["repeats", "latest", "longest", "never", "loops", "one token", "no room", "empty", "single"],
)
def test_examples(tokens: list[int], limit: int, draft: list[int]) -> None:
    assert lookup(tokens, limit, MIN_MATCH) == draft


def test_a_match_across_two_tokens_is_none() -> None:
    # In bytes, the token 1 stands at offset 1 of (256, 0).
    assert lookup([256, 0, 7, 1], 2, 1) == []
    assert lookup([1, 9, 256, 0, 1], 2, 1) == [9, 256], "and does not hide the true one before it"


def sequence_of(tokens: list[int], misses: int = 0) -> Sequence:
    request = Request("r", (1,), SamplingParams())
    return Sequence(request, 0, 0, "ngram", 4, False, frozenset(), tokens, misses=misses)


class TestDrafter:
    def test_each_sequence_has_its_own_history_and_limit(self) -> None:
        sequences = [sequence_of([1, 2, 3, 1, 2]), sequence_of([4, 5, 4, 5]), sequence_of([6, 7, 8])]
        assert NgramDrafter().propose(sequences, [1, 3, 4]) == [[3], [4, 5, 4], []]

    @pytest.mark.parametrize(
        ("repeated", "misses", "drafts"), [(2, 0, True), (2, 1, False), (3, 1, True), (9, 7, True)]
    )
    def test_after_drafts_in_vain_it_wants_longer_repetitions(self, repeated: int, misses: int, drafts: bool) -> None:
        history = [*range(repeated), 50, 51, *range(repeated)]
        (draft,) = NgramDrafter().propose([sequence_of(history, misses)], [2])
        assert draft == ([50, 51] if drafts else [])
