"""How many tokens to draft, none included, so that the step pays. Pure Python.

Of the B sequences of a step, k draft by one drafter, and the controller grants each of them
the same width g: the most tokens that it may draft. Such a step emits

    k * (1 + a_1 + ... + a_g)  and what the other sequences emit,

with a_j the chance that a draft's j-th token is accepted, and takes a time that depends on B
and g. Acceptance and times are learnt while serving, and the width with the most tokens per
second is chosen. Output does not depend on any of it.

To learn about another width costs time, so the controller keeps an account of it: a width is
looked at when what the look will cost is a small part of the time served since the last one.
Widths that nearly pay are thus looked at often and hopeless ones hardly ever, and what all
looks cost together is bounded, whatever the machine.

There is no clock and no chance in here: the same calls get the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

DECAY = 0.98
"""What a step leaves of what was known of acceptance. A text changes its character within a few lines."""
PRIOR_DRAFTS = 2.0
"""What it weighs that a token is accepted as often as the one before it, and the first one as often as not."""
PRIOR_MEASUREMENTS = 2
"""What it weighs that a time was measured before, as measurements of now."""
PRIOR_REACHED = 16.0
"""Drafts that an acceptance measured before counts for."""
SETTLED = 12
"""Measurements over which a time is averaged, more or less."""
TOGETHER = 0.8
"""How much of the best width's movement all times of a batch size share: the machine slows down for all."""
HICCUP = 1.5
"""A time that much longer than its estimate counts as no more."""
MARGIN = 1.02
"""Another width must promise this much more to be preferred to the last one."""
LOOK_BUDGET = 0.03
"""The part of the time that looks may cost, all together, while times are little known; an eighth of it later."""
DRAFT_BUDGET = 0.007
"""The part of the time that drafts may cost where none pay, to hear of it when they do."""
LEAST_LOSS = 0.01
"""The part of a step's time that every look is taken to cost, so that equals are not compared all the time."""
PATIENCE = 8
"""Steps that a look is asked for in vain: rows or blocks may not allow its width.

It takes two if nothing is in its way: a fused drafter drafts as widely as the step before let it.
"""
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Prior(TypedDict):
    """What `skippy tune` measured, for a controller to begin with.

    seconds: of a step per sequence, by `batch_class` and by width.
    acceptance: the share of drafts whose token at each depth was accepted.
    """

    seconds: Mapping[int, Mapping[int, float]]
    acceptance: Sequence[float]


class Controller:
    """Chooses the width of each step's drafts among WIDTHS up to `most`.

    Acceptance is pooled over sequences, because a drafter with confidence ends its drafts
    where a text is hard, whatever it was granted; times are kept by batch size, rounded up to
    a power of two.

    Args:
        prior: what is known already; it is corrected while serving like all else.

    Attributes:
        most: the widest it chooses.
    """

    def __init__(self, most: int, prior: Prior | None = None) -> None:
        self.most = most
        self._widths = widths_up_to(most)
        self._prior = prior or Prior(seconds={}, acceptance=())
        self._acceptance = _Acceptance(most, self._prior["acceptance"])
        self._share = 1.0  # k / B
        self._others = 0.0  # tokens of the other sequences, / B
        self._times: dict[int, _Times] = {}

    def width(self, batch: int) -> int:
        """The width for the next step, of `batch` sequences."""
        return self._times_of(batch).choose(self._tokens())

    def best(self, batch: int, rides: bool = False) -> int:
        """The width for a step that will not be observed, where to look at another one would be in vain.

        Args:
            rides: whether this decides how widely the next step can draft: then a look that was begun goes on.
        """
        times = self._times_of(batch)
        return times.look if rides and times.look is not None else times.prefer(self._tokens())

    def observe(self, batch: int, width: float, seconds: float, accepted: Sequence[int], others: int = 0) -> None:
        """What became of a step.

        Args:
            batch: all its sequences.
            width: the width that there was room for, on the average; its time counts as that of the nearest one.
            accepted: of the draft of each sequence that was granted it, how many tokens were accepted.
            others: how many tokens the other sequences emitted.
        """
        nearest = min(self._widths, key=lambda one: abs(one - width))
        self._acceptance.observe(min(nearest, math.ceil(width)), accepted)
        self._share = DECAY * self._share + (1.0 - DECAY) * len(accepted) / batch
        self._others = DECAY * self._others + (1.0 - DECAY) * others / batch
        self._times_of(batch).observe(nearest, seconds / batch)

    def renewed(self) -> Controller:
        """One that begins with what this one knows of times, for drafts of which other shares are accepted."""
        seconds = {batch: times.seconds for batch, times in self._times.items()}
        return Controller(self.most, Prior(seconds=seconds, acceptance=()))

    def _tokens(self) -> list[float]:
        """By width, what a step promises per sequence."""
        return [self._others + self._share * count for count in self._acceptance.tokens()]

    def _times_of(self, batch: int) -> _Times:
        key = batch_class(batch)
        if key not in self._times:
            self._times[key] = _Times(self._widths, self._prior["seconds"].get(key, {}))
        return self._times[key]


def widths_up_to(most: int) -> list[int]:
    """Those that a controller chooses among."""
    return [width for width in WIDTHS if width < most] + [most]


def batch_class(batch: int) -> int:
    """Batch sizes whose times are kept together: the next power of two."""
    return 1 << max(0, batch - 1).bit_length()


class _Acceptance:
    """How often a draft's token is accepted, given that all before it were.

    Depths seldom reached lean on the one before them, so widths never granted are judged, too.
    """

    def __init__(self, most: int, known: Sequence[float]) -> None:
        alive = [PRIOR_REACHED * share for share in (1.0, *known)][: most + 1]
        unknown = [0.0] * (most + 1 - len(alive))
        self._reached = [*alive[:-1], *unknown]
        self._accepted = [*alive[1:], *unknown]

    def observe(self, width: int, accepted: Sequence[int]) -> None:
        for depth in range(min(width, len(self._reached))):
            reached = sum(count >= depth for count in accepted)
            if not reached:
                break
            self._reached[depth] = DECAY * self._reached[depth] + reached
            self._accepted[depth] = DECAY * self._accepted[depth] + sum(count > depth for count in accepted)

    def tokens(self) -> list[float]:
        """By width, the tokens that a sequence gets of a step, the verifier's own included."""
        expected, alive, chance = [1.0], 1.0, 0.5
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            chance = (accepted + PRIOR_DRAFTS * chance) / (reached + PRIOR_DRAFTS)
            alive *= chance
            expected.append(expected[-1] + alive)
        return expected


class _Times:
    """Seconds per sequence of steps of about one batch size, by width, and which to choose.

    Attributes:
        look: the width that is looked at until it was timed.
    """

    def __init__(self, widths: Sequence[int], known: Mapping[int, float]) -> None:
        self._widths = widths
        self.seconds = {width: known[width] for width in widths if width in known}
        self._counts = {width: PRIOR_MEASUREMENTS * (width in known) for width in widths}
        self._clock = self._drafted_at = 0.0
        self._seen_at = dict.fromkeys(widths, 0.0)
        # Until something is known: a draft that is rarely much too long.
        self._best = min(2, widths[-1])
        # Widest first: it shows the acceptance at every depth.
        self._first = [width for width in (self._best, 0, widths[-1]) if width not in known]
        self.look: int | None = None
        self._asked = 0

    def prefer(self, tokens: Sequence[float]) -> int:
        """The best width by what is known, if width g promises tokens[g] per sequence."""
        if self.seconds and not self._first:
            self._weigh(tokens)
        return self._best

    def choose(self, tokens: Sequence[float]) -> int:
        """The width to be granted, be it to look at it, if width g promises tokens[g] per sequence."""
        if self.look is not None and self._asked == PATIENCE:
            self._seen_at[self.look] = self._clock
            self.look = None
        if self.look is None:
            self.look = self._first.pop() if self._first else self._due(tokens)
            self._asked = 0
        if self.look is None:
            return self._best
        self._asked += 1
        return self.look

    def observe(self, width: int, seconds: float) -> None:
        self._clock += seconds
        if width:
            self._drafted_at = self._clock
        self._seen_at[width] = self._clock
        self._counts[width] += 1
        self._learn(width, seconds, self._counts[width])
        # The first time of anything may be slow, so a look at something new takes two.
        if width == self.look and self._counts[width] > 1:
            self.look = None

    def _learn(self, width: int, seconds: float, count: int) -> None:
        old = _interpolate(self.seconds, width) if width in self.seconds else seconds
        if count <= 2:
            self.seconds[width] = min(old, seconds)
            return
        new = old + (min(seconds, HICCUP * old) - old) / min(count, SETTLED)
        if count >= SETTLED and width == self._best:
            for other in self.seconds:
                self.seconds[other] *= (new / old) ** TOGETHER
        self.seconds[width] = new

    def _weigh(self, tokens: Sequence[float]) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds and tokens per second of every width; the best one may become another."""
        seconds = {width: _interpolate(self.seconds, width) for width in self._widths}
        rates = {width: tokens[width] / seconds[width] for width in self._widths}
        best = max(rates, key=lambda width: rates[width])
        if rates[best] > MARGIN * rates[self._best]:
            self._best = best
        return seconds, rates

    def _due(self, tokens: Sequence[float]) -> int | None:
        """Find the best width, and whether to look at another one before granting it."""
        if not self.seconds:
            return None
        seconds, rates = self._weigh(tokens)
        # What a look at a width takes longer than its tokens take at the best one.
        losses = {w: max(LEAST_LOSS * seconds[w], seconds[w] - tokens[w] / rates[self._best]) for w in self._widths}
        if not self._best:
            width = max(self._widths[1:], key=lambda width: rates[width])
            if losses[width] <= DRAFT_BUDGET * (self._clock - self._drafted_at):
                return width
        due = [w for w in self._widths if w != self._best and losses[w] <= self._account(w)]
        return max(due, key=lambda w: self._clock - self._seen_at[w], default=None)

    def _account(self, width: int) -> float:
        """The seconds that a look at a width may cost now."""
        known = min(1 + self._counts[width], 8)
        return LOOK_BUDGET / len(self._widths) / known * (self._clock - self._seen_at[width])


def _interpolate(seconds: Mapping[int, float], width: int) -> float:
    """The time at a width: what was measured, else on the line between its neighbours, and no more than any wider one.

    Beyond the measured ones it is on the line through the last two, if that rises.
    """
    wider = [seconds[w] for w in seconds if w >= width]
    if width in seconds:
        return min(wider)
    below = max((w for w in seconds if w < width), default=None)
    above = min((w for w in seconds if w > width), default=None)
    if below is None:
        return min(wider)
    if above is None:
        before = max((w for w in seconds if w < below), default=below)
        slope = (seconds[below] - seconds[before]) / max(1, below - before)
        return seconds[below] + max(0.0, slope) * (width - below)
    share = (width - below) / (above - below)
    return min(seconds[below] + share * (seconds[above] - seconds[below]), *wider)
