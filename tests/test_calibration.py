"""How often guesses were right, by their grounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippy.engine.drafters.calibration import DECAY, LEVELS, Calibration, ConfidenceCalibration, Guess
from skippy.engine.sequence import Sequence
from skippy.engine.types import Request, SamplingParams


def sequence_of(*tokens: int) -> Sequence:
    return Sequence(Request("r", (1,), SamplingParams()), 0, 0, "suffix", 4, False, frozenset(), list(tokens))


def test_nothing_known_is_a_half() -> None:
    assert Calibration().chance("anything") == 0.5


def test_guesses_are_judged_once_by_what_came_up_to_the_first_wrong_one() -> None:
    calibration, sequence = Calibration(), sequence_of(1, 2)
    calibration.note(sequence, [Guess(3, "a"), Guess(4, "b"), Guess(5, "c")])
    sequence.tokens += [3, 9, 5]
    for _ in range(2):
        calibration.settle(sequence)
        assert calibration.chance("a") == 1.5 / 2
        assert calibration.chance("b") == 0.5 / 2
        assert calibration.chance("c") == 0.5


def test_what_has_not_come_yet_is_not_judged() -> None:
    calibration, sequence = Calibration(), sequence_of(1)
    calibration.note(sequence, [Guess(3, "a"), Guess(4, "b")])
    sequence.tokens += [3]
    calibration.settle(sequence)
    assert (calibration.chance("a"), calibration.chance("b")) == (0.75, 0.5)


def test_the_latest_note_counts_and_each_sequence_has_its_own() -> None:
    calibration, one, other = Calibration(), sequence_of(1), sequence_of(1)
    calibration.note(one, [Guess(7, "a")])
    calibration.note(one, [Guess(3, "b")])
    calibration.note(other, [Guess(3, "c")])
    one.tokens += [3]
    other.tokens += [4]
    calibration.settle(one)
    calibration.settle(other)
    assert [calibration.chance(ground) for ground in "abc"] == [0.5, 0.75, 0.25]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_a_chance_is_the_decayed_share(outcomes: list[bool]) -> None:
    calibration = Calibration()
    for right in outcomes:
        sequence = sequence_of(1)
        calibration.note(sequence, [Guess(2, "a")])
        sequence.tokens.append(2 if right else 3)
        calibration.settle(sequence)
    weights = [DECAY ** (len(outcomes) - 1 - i) for i in range(len(outcomes))]
    held = sum(weight for weight, right in zip(weights, outcomes, strict=True) if right)
    assert calibration.chance("a") == pytest.approx((held + 0.5) / (sum(weights) + 1))


def test_what_is_supposed_holds_until_guesses_outweigh_it() -> None:
    calibration, sequence = Calibration(), sequence_of(1)
    assert calibration.chance("a", supposed=0.2, weight=3.0) == pytest.approx(0.2)
    calibration.note(sequence, [Guess(3, "a")])
    sequence.tokens += [3]
    calibration.settle(sequence)
    assert calibration.chance("a", supposed=0.2, weight=3.0) == pytest.approx(1.6 / 4)


def test_a_confidence_is_taken_at_its_word_until_it_is_judged() -> None:
    calibration, sequence = ConfidenceCalibration(), sequence_of(1)
    as_told = [(level + 0.5) / LEVELS for level in range(LEVELS)]
    assert calibration.chances(greedy=True) == calibration.chances(greedy=False) == pytest.approx(as_told)
    for _ in range(30):
        calibration.note_levels(sequence, [(3, 0), (3, 9)], greedy=True)
        sequence.tokens += [3, 5]
        calibration.settle(sequence)
    greedy, sampled = calibration.chances(greedy=True), calibration.chances(greedy=False)
    assert greedy[0] > 0.8
    assert greedy[9] < 0.2
    assert greedy[1:9] == pytest.approx(as_told[1:9])
    assert sampled == pytest.approx(as_told)
