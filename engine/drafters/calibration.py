"""How far a drafter can be trusted, measured while it drafts. Pure Python."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from skippy.engine.sequence import Sequence

DECAY = 0.98
"""What a guess leaves of what was known before: some fifty count, for a text changes its character within lines."""
LEVELS = 10
"""Of a drafter's own confidence, from 0 to 1, that are told apart."""
PRIOR_GUESSES = 4.0
"""What it weighs that a confidence is what it says."""


class Guess(NamedTuple):
    """A token, and on what ground it was guessed; guesses on like grounds are as often right."""

    token: int
    ground: Hashable


class Calibration:
    """The share of right guesses by ground, and the guesses that are still to be judged.

    A guess need not have been drafted to be judged: that the text goes on tells. So what was
    found too uncertain to be worth a row is found out for free once it is worth one.
    """

    def __init__(self) -> None:
        self._right: dict[Hashable, float] = {}
        self._judged: dict[Hashable, float] = {}
        self._open: dict[Sequence, tuple[int, list[Guess]]] = {}

    def chance(self, ground: Hashable, supposed: float = 0.5, weight: float = 1.0) -> float:
        """How likely a guess on this ground is right if those before it are.

        Args:
            supposed: how likely when nothing is known.
            weight: how many judged guesses that counts for.
        """
        return (self._right.get(ground, 0.0) + weight * supposed) / (self._judged.get(ground, 0.0) + weight)

    def note(self, sequence: Sequence, guesses: Iterable[Guess]) -> None:
        """Remember what was guessed to follow the sequence's tokens, in order, until it is settled."""
        self._open[sequence] = len(sequence.tokens), list(guesses)

    def settle(self, sequence: Sequence) -> None:
        """Judge what was noted, up to the first wrong guess: those behind it were guessed of another text."""
        start, guesses = self._open.pop(sequence, (0, []))
        for guess, token in zip(guesses, sequence.tokens[start : start + len(guesses)], strict=False):
            right = guess.token == token
            self._right[guess.ground] = self._right.get(guess.ground, 0.0) * DECAY + right
            self._judged[guess.ground] = self._judged.get(guess.ground, 0.0) * DECAY + 1.0
            if not right:
                break


class ConfidenceCalibration(Calibration):
    """Of guesses made by a drafter that tells how confident it is of each.

    The likeliest token is mostly the greedy choice, however small its share of the softmax, and
    loses against noise more often: so one confidence means two things.
    """

    def chances(self, *, greedy: bool) -> list[float]:
        """By level of confidence, how likely a guess is right if those before it are."""
        return [self.chance((greedy, level), (level + 0.5) / LEVELS, PRIOR_GUESSES) for level in range(LEVELS)]

    def note_levels(self, sequence: Sequence, guesses: Iterable[tuple[int, int]], *, greedy: bool) -> None:
        """As `note`, of tokens and their levels."""
        self.note(sequence, (Guess(token, (greedy, level)) for token, level in guesses))
