"""How many tokens to draft, none included, so that the step pays. Pure Python.

Drafting g tokens for each of B sequences promises B * (1 + a_1 + ... + a_g) tokens, with a_j
the share of drafts whose token j was accepted, and costs the time that such a step takes.
Both are measured while serving: nothing is assumed about the machine. Output does not
depend on any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

DECAY = 0.98
"""What the last draft leaves of what was known before. A text changes its character within a few lines."""
TIME_SHARE = 0.2
"""How far a new time moves its estimate."""
HICCUP = 1.25
"""A time that much longer than its estimate counts as no more: machines have moods."""
PROBE_EVERY = 64
"""Steps between two looks at the width that was not measured for the longest time.

A look takes two steps: a fused drafter drafts as widely as the step before let it.
"""
MARGIN = 1.02
"""Another width must promise this much more to be preferred to the last one."""
PATIENCE = 8
"""Steps that a width to be measured is asked for in vain: rows or blocks may not allow it, or prompts never end."""
PRIOR_DRAFTS = 16.0
"""Drafts that a prior's acceptance counts for."""
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


_Promise = Callable[[int], float]


class Prior(TypedDict):
    """What `skippy tune` measured, for a controller to begin with.

    seconds: of a step per sequence, by batch size rounded up to a power of two, and by width.
    acceptance: the share of drafts whose token at each depth was accepted.
    """

    seconds: Mapping[int, Mapping[int, float]]
    acceptance: Sequence[float]


class Controller:
    """Chooses the width of each step's drafts among WIDTHS up to `most`.

    Times are kept by batch size, rounded up to a power of two; acceptance is pooled.

    Args:
        prior: what is known already; it is corrected while serving like all else.

    Attributes:
        most: the widest it chooses.
    """

    def __init__(self, most: int, prior: Prior | None = None) -> None:
        self.most = most
        self._widths = widths_up_to(most)
        self._accepted = [0.0] * most
        self._drafts = [0.0] * most
        self._prior = prior or {"seconds": {}, "acceptance": ()}
        for depth, share in enumerate(self._prior["acceptance"][:most]):
            self._drafts[depth], self._accepted[depth] = PRIOR_DRAFTS, PRIOR_DRAFTS * share
        self._classes: dict[int, _BatchClass] = {}

    def width(self, batch: int) -> int:
        """The width for a step of `batch` sequences."""
        return self._class_of(batch).choose(self._promise)

    def observe(self, batch: int, width: int, seconds: float, accepted: Sequence[int]) -> None:
        """What a step of that width took, and how many tokens of each sequence's draft were accepted."""
        self._class_of(batch).time(width, seconds / batch)
        for count in accepted:
            for depth in range(min(width, len(self._drafts))):
                self._drafts[depth] = self._drafts[depth] * DECAY + 1.0
                self._accepted[depth] = self._accepted[depth] * DECAY + (depth < count)

    def acceptance(self, depth: int) -> float:
        """The share of recent drafts whose token at `depth` (from 0) was accepted; a half when nothing is known."""
        return (self._accepted[depth] + 0.5) / (self._drafts[depth] + 1.0)

    def _class_of(self, batch: int) -> _BatchClass:
        key = batch_class(batch)
        if key not in self._classes:
            self._classes[key] = _BatchClass(self._widths, self._prior["seconds"].get(key, {}))
        return self._classes[key]

    def _promise(self, width: int) -> float:
        """Tokens per sequence and step. A token is accepted no more often than the one before it."""
        total = least = 1.0
        for depth in range(width):
            least = min(least, self.acceptance(depth))
            total += least
        return total


class _BatchClass:
    """Times of steps of about one batch size, by width."""

    def __init__(self, widths: Sequence[int], known: Mapping[int, float]) -> None:
        self._seconds = {width: known[width] for width in widths if width in known}
        unknown = [width for width in widths if width not in known]
        # Widest first: it shows the acceptance at every depth. Twice: the first time of anything may be slow.
        self._unmeasured = sorted([*unknown, *unknown])
        self._age = dict.fromkeys(widths, 0)
        self._steps = 0
        self._probe = widths[-1]
        # Until something is known: a draft that is rarely much too long.
        self._last = min(2, widths[-1])
        self._in_vain = 0

    def choose(self, promise: _Promise) -> int:
        self._steps += 1
        if self._unmeasured and self._in_vain >= PATIENCE:
            self._unmeasured.pop()
            self._in_vain = 0
        if self._unmeasured:
            self._in_vain += 1
            return self._unmeasured[-1]
        if not self._seconds:
            return self._last
        if self._steps % PROBE_EVERY == 0:
            self._probe = min(self._age, key=lambda width: self._age[width])
        if self._steps % PROBE_EVERY < 2:
            return self._probe
        rates = {width: promise(width) / seconds for width, seconds in self._seconds.items()}
        best = max(rates, key=lambda width: rates[width])
        if self._last not in rates or rates[best] > MARGIN * rates[self._last]:
            self._last = best
        return self._last

    def time(self, width: int, seconds: float) -> None:
        if width not in self._age:
            return
        self._age[width] = self._steps
        old = self._seconds.get(width, seconds)
        if width in self._unmeasured:
            self._unmeasured.remove(width)
            self._in_vain = 0
            self._seconds[width] = min(old, seconds)
            return
        self._seconds[width] = old + TIME_SHARE * (min(seconds, HICCUP * old) - old)


def widths_up_to(most: int) -> list[int]:
    """Those that a controller chooses among."""
    return [width for width in WIDTHS if width < most] + [most]


def batch_class(batch: int) -> int:
    """Batch sizes whose times are kept together: the next power of two."""
    return 1 << max(0, batch - 1).bit_length()
