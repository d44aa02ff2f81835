"""The acceptance rule against its specification."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippy.engine.accept import Verdict, accept

tokens = st.integers(0, 2)


@st.composite
def verified_drafts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    chosen = draw(st.lists(tokens, min_size=1, max_size=7))
    # Mostly right, so that long drafts get accepted too.
    draft = [draw(st.sampled_from([token, token, token, (token + 1) % 3])) for token in chosen[:-1]]
    return draft, chosen


def specification(draft: list[int], chosen: list[int], ends: set[int], room: int) -> Verdict:
    """Every choice whose past was drafted right, while there is room and none before it ended the output."""
    emitted = [c for j, c in enumerate(chosen[:room]) if draft[:j] == chosen[:j] and not ends & set(chosen[:j])]
    agreed = [j for j in range(min(len(draft), len(emitted))) if draft[: j + 1] == emitted[: j + 1]]
    return Verdict(emitted, len(agreed))


@settings(derandomize=True, deadline=None, max_examples=500)
@given(verified=verified_drafts(), ends=st.sets(tokens, max_size=2), room=st.integers(1, 8))
def test_the_rule(verified: tuple[list[int], list[int]], ends: set[int], room: int) -> None:
    draft, chosen = verified
    assert accept(draft, chosen, ends, room) == specification(draft, chosen, ends, room)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(verified=verified_drafts(), ends=st.sets(tokens, max_size=2), room=st.integers(1, 8))
def test_what_is_emitted_is_chosen_whatever_is_drafted(
    verified: tuple[list[int], list[int]], ends: set[int], room: int
) -> None:
    draft, chosen = verified
    emitted, accepted = accept(draft, chosen, ends, room)
    assert 1 <= len(emitted) <= room
    assert emitted == chosen[: len(emitted)]
    assert accepted <= len(emitted) <= accepted + 1
    assert not ends & set(emitted[:-1])
    plain = accept([], chosen[:1], ends, room)
    assert emitted[:1] == plain.emitted, "the first token is the one that plain decoding emits"


@pytest.mark.parametrize(
    ("draft", "chosen", "ends", "room", "emitted", "accepted"),
    [
        pytest.param([], [5], set(), 9, [5], 0, id="no draft"),
        pytest.param([5, 6], [5, 6, 7], set(), 9, [5, 6, 7], 2, id="all right"),
        pytest.param([5, 6], [5, 8, 7], set(), 9, [5, 8], 1, id="second wrong"),
        pytest.param([5, 6], [4, 6, 7], set(), 9, [4], 0, id="first wrong"),
        pytest.param([5, 6], [5, 6, 7], {5}, 9, [5], 1, id="ends at the first"),
        pytest.param([5, 6], [5, 6, 7], {6}, 9, [5, 6], 2, id="ends at the last"),
        pytest.param([5, 6], [5, 6, 7], {7}, 9, [5, 6, 7], 2, id="ends at the bonus token"),
        pytest.param([5, 6], [5, 6, 7], set(), 1, [5], 1, id="room for one"),
        pytest.param([5, 6], [5, 6, 7], set(), 2, [5, 6], 2, id="room for the draft"),
    ],
)
def test_examples(
    *, draft: list[int], chosen: list[int], ends: set[int], room: int, emitted: list[int], accepted: int
) -> None:
    assert accept(draft, chosen, ends, room) == (emitted, accepted)


def test_the_arguments_are_left_alone() -> None:
    draft, chosen = [1, 2], [1, 2, 3]
    accept(draft, chosen, {1}, 1)
    assert (draft, chosen) == ([1, 2], [1, 2, 3])
