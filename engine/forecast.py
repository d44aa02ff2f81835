"""From what was measured step by step to tokens per second. Pure Python.

The output does not depend on how it is drafted, so the steps of any decode of a prompt tell
something about every other decode of it: at a place in the text, what was drafted and
accepted. Of a draft of g tokens the first w are what a draft of w tokens is. Going along the
text with a fixed width, from place to place as a decode would, counts its steps; a mean over
all places would count too few. Times are means by batch size and width, each step weighted with
how much oftener a decode of that width alone would stand at such a place than a sweep does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from skippy.engine.controller import Prior, batch_class

FEWEST = 3
"""Steps of a batch size and width without which their mean is not believed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft at a place: how many tokens it was allowed, and how many of its first ones were accepted."""

    width: int
    accepted: int


@dataclass(slots=True)
class StepTimes:
    """Of steps of about one batch size, and one width: seconds, batch sizes, rows per sequence to verify, weights."""

    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def mean(self, values: Sequence[float]) -> float:
        return fmean(values, self.weight)

    @property
    def total(self) -> float:
        return self.mean(self.draft) + self.mean(self.verify) + self.mean(self.host)

    @property
    def passes(self) -> float:
        """Per sequence and without what the host does, as the controller counts it."""
        return (self.mean(self.draft) + self.mean(self.verify)) / self.mean(self.batch)


@dataclass(slots=True)
class Observations:
    """What was seen of one drafter on some prompts.

    Attributes:
        drafts: of each prompt, by place: how many output tokens there were before.
        times: by batch class and width.
        prompt_seconds, prompt_tokens: of the steps that computed prompts and nothing else.
    """

    num_prompts: int
    drafts: list[defaultdict[int, list[Draft]]] = field(init=False)
    times: defaultdict[tuple[int, int], StepTimes] = field(default_factory=lambda: defaultdict(StepTimes))
    prompt_seconds: float = 0.0
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self.drafts = [defaultdict(list) for _ in range(self.num_prompts)]

    def forget_times(self) -> None:
        """Keep only the drafts."""
        self.times.clear()
        self.prompt_seconds, self.prompt_tokens = 0.0, 0

    def count(self, batch: int, widths: Sequence[int]) -> int:
        """The steps seen of the width that was seen least."""
        return min(len(self.times[batch_class(batch), width].verify) for width in widths)

    def weight(self, prompt: int, place: int, width: int, widths: Sequence[int]) -> float:
        """How much oftener decodes of `width` alone come to places like this one than a sweep of `widths` does.

        A step that accepts n tokens goes n + 1 places on.
        """
        wide = {
            at: draft.accepted
            for at, drafts in self.drafts[prompt].items()
            for draft in drafts
            if draft.width >= max(widths)
        }
        if not wide:
            return 1.0
        deepest = wide[min(wide, key=lambda at: (abs(at - place), at))]
        return fmean(1 + min(deepest, other) for other in widths) / (1 + min(deepest, width))

    def covers(self, widths: Sequence[int]) -> bool:
        """Whether every width was seen with some batch size."""
        return {width for (_, width), times in self.times.items() if times.verify} >= set(widths)

    def step_seconds(self, batch: int, width: int) -> float:
        """Of a step, interpolated between the batch sizes that were seen with this width.

        Raises:
            KeyError: none was.
        """
        seen = [times for (_, w), times in sorted(self.times.items()) if w == width and times.verify]
        known = [(fmean(times.batch), times.total) for times in seen if len(times.verify) >= FEWEST]
        known = known or [(fmean(times.batch), times.total) for times in seen]
        if not known:
            raise KeyError(width)
        low = max((point for point in known if point[0] <= batch), default=known[0])
        high = min((point for point in known if point[0] >= batch), default=known[-1])
        if low[0] >= high[0]:
            return high[1] if low[0] > batch else low[1]
        return low[1] + (high[1] - low[1]) * (batch - low[0]) / (high[0] - low[0])

    def acceptance(self, most: int) -> list[float]:
        """The share of drafts wide enough whose token at each depth was accepted; ends where none was that wide."""
        shares: list[float] = []
        drafts = [draft for places in self.drafts for at_place in places.values() for draft in at_place]
        for depth in range(most):
            wide = [draft.accepted > depth for draft in drafts if draft.width > depth]
            if not wide:
                break
            shares.append(fmean(wide))
        return shares

    def constant_acceptance(self) -> float:
        """The one chance for a token after accepted ones that explains the drafts best, of a geometric distribution."""
        drafts = [d for places in self.drafts for at_place in places.values() for d in at_place if d.width]
        accepted = sum(draft.accepted for draft in drafts)
        rejected = sum(draft.accepted < draft.width for draft in drafts)
        return accepted / max(1, accepted + rejected)

    def prior(self, most: int) -> Prior:
        """For a controller."""
        seconds: defaultdict[int, dict[int, float]] = defaultdict(dict)
        for (size, width), times in sorted(self.times.items()):
            if len(times.verify) >= FEWEST:
                seconds[size][width] = times.passes
        return {"seconds": seconds, "acceptance": self.acceptance(most)}


def accepted_along(drafts: Mapping[int, Sequence[Draft]], width: int, length: int) -> list[int]:
    """What each step accepts of a decode of `length` tokens with drafts of `width`, the step of the prompt apart.

    A place that no draft as wide began at is taken to be like the nearest one; without any nothing is accepted. A
    narrower draft that failed would tell as much, but one that held would not, and to use the one kind alone would
    be to count too few.
    """
    known: dict[int, int] = {}
    for place, at_place in drafts.items():
        enough = min(width, length - place - 1)
        accepted = next((draft.accepted for draft in at_place if draft.width >= enough), None)
        if accepted is not None:
            known[place] = min(accepted, width)
    steps: list[int] = []
    place = 1  # the step that computes the prompt chooses the first token
    while place < length:
        nearest = min(known, key=lambda other: (abs(other - place), other), default=None)
        accepted = known[nearest] if nearest is not None and width else 0
        steps.append(min(accepted, length - place - 1))
        place += steps[-1] + 1
    return steps


@dataclass(frozen=True, slots=True)
class Forecast:
    tokens_per_second: float
    tokens_per_step: float


def predict(seen: Observations, prompts: Sequence[int], width: int, batch: int, length: int) -> Forecast:
    """How a decode of all prompts would go, `batch` at a time, each with drafts of one width.

    As sequences end, others take their places; in the end fewer run than could.

    Args:
        prompts: the tokens of each.
        length: the tokens of each output.
    """
    steps = [len(accepted_along(drafts, width, length)) for drafts in seen.drafts]
    per_prompt_token = seen.prompt_seconds / max(1, seen.prompt_tokens)
    waiting, running, seconds = list(range(len(prompts)))[::-1], dict[int, int](), 0.0
    while waiting or running:
        seconds += seen.step_seconds(len(running), width) if running else 0.0
        running = {index: left - 1 for index, left in running.items() if left > 1}
        while waiting and len(running) < batch:
            index = waiting.pop()
            seconds += per_prompt_token * prompts[index]
            if steps[index]:
                running[index] = steps[index]
    tokens = length * len(prompts)
    return Forecast(tokens / seconds, tokens / (sum(steps) + len(prompts)))
