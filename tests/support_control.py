"""Engines that are not there: made-up machines, texts and loads, on a clock that is only counted.

A text says, for every place of it, how many tokens a drafter drafts there if it may and how
many of them are right; a machine, how long a step takes; a load, how many clients there are
at any moment. All three are fixed before a run, so every policy meets the same.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

RECORDED = Path(__file__).parent / "data" / "builtin_drafts.json"
"""Of the built-in model and its adapter."""
MOST_CLIENTS = 32
CLIENTS = (1, 4, 16, 32, 0)
"""Loads of a trace; 0 where they come and go."""
LENGTH = 3000
"""Places of a text; behind the last one it begins again."""
WITHOUT_END = 2**20
"""A drafter without confidence drafts as many tokens as it may."""


LOOKUP_WIDTH = 10


class Place(NamedTuple):
    """What a drafter does at a place of a text.

    Attributes:
        drafted: the most tokens that it drafts.
        right: how many of them are.
        looked_up: how many tokens of a lookup are right, which costs nothing and takes the draft's place, or None.
    """

    drafted: int
    right: int
    looked_up: int | None = None


Text = SequenceOf[Place]


class Policy(Protocol):
    def width(self, batch: int) -> int: ...

    def observe(self, batch: int, width: float, seconds: float, accepted: SequenceOf[int], others: int) -> None: ...


class Fixed:
    """Always the same width."""

    def __init__(self, width: int) -> None:
        self._width = width

    def width(self, batch: int) -> int:
        del batch
        return self._width

    def observe(self, batch: int, width: float, seconds: float, accepted: SequenceOf[int], others: int) -> None:
        pass


# --- texts ------------------------------------------------------------------------------------------------------


def text_of(acceptance: Iterable[float], seed: int) -> Text:
    """Each token of a draft is right with the probability that holds where the draft begins."""
    chance = random.Random(seed)
    return [
        Place(WITHOUT_END, WITHOUT_END if p >= 1.0 else int(math.log(1.0 - chance.random()) / math.log(p)) if p else 0)
        for p in acceptance
    ]


def steady(acceptance: float) -> Callable[[int], Text]:
    return lambda client: text_of([acceptance] * LENGTH, client)


def alternating(client: int) -> Text:
    """Easy and hard passages of some lines each, at other places for every client."""
    chance = random.Random(client)
    places: list[float] = []
    while len(places) < LENGTH:
        places += [0.93] * chance.randint(30, 120) + [0.1] * chance.randint(30, 120)
    return text_of(places[:LENGTH], client)


def drifting(client: int) -> Text:
    """From hard to easy and back, for all clients alike."""
    return text_of((0.5 - 0.4 * math.cos(2 * math.pi * place / LENGTH) for place in range(LENGTH)), client)


def mixed(client: int) -> Text:
    """Every other client writes what is easy."""
    return text_of([0.15 if client % 2 else 0.9] * LENGTH, client)


@cache
def _recorded(temperature: str) -> list[list[Place]]:
    records = json.loads(RECORDED.read_text(encoding="utf-8"))[temperature]
    return [
        [
            Place(int(drafted, 36), int(right, 36), None if found == "-" else int(found, 36))
            for drafted, right, found in zip(one["drafted"], one["right"], one["looked_up"], strict=True)
        ]
        for one in records
    ]


def recorded(temperature: str, lookups: bool) -> Callable[[int], Text]:
    """The built-in model's own texts one behind the other, another one first for each client."""

    def text(client: int) -> Text:
        texts = _recorded(temperature)
        if not lookups:
            texts = [[place._replace(looked_up=None) for place in one] for one in texts]
        first = 5 * client % len(texts)
        return [place for one in texts[first:] + texts[:first] for place in one]

    return text


TEXTS: dict[str, Callable[[int], Text]] = {
    "never": steady(0.0),
    "hard": steady(0.3),
    "medium": steady(0.6),
    "easy": steady(0.9),
    "always": steady(1.0),
    "alternating": alternating,
    "drifting": drifting,
    "mixed": mixed,
    "greedy": recorded("0.0", lookups=False),
    "sampled": recorded("0.8", lookups=False),
    "greedy, lookups": recorded("0.0", lookups=True),
    "sampled, lookups": recorded("0.8", lookups=True),
}

# --- machines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Milliseconds of passes.

    Attributes:
        verify: of a batch and its rows, drafted ones included.
        draft: of so many sequences, the width they were granted, and the length of the longest draft.
        noise: standard deviation of the logarithm of a step's time.
        slowdown: how much longer everything takes in the second half of a run.
    """

    verify: Callable[[int, int], float]
    draft: Callable[[int, int, int], float]
    noise: float = 0.05
    hiccups: float = 0.01
    slowdown: float = 1.0

    def seconds(self, batch: int, rows: int, drafting: int, width: int, longest: int) -> float:
        draft = self.draft(drafting, width, longest) if drafting and width else 0.0
        return 1e-3 * (self.verify(batch, rows) + draft)


def _cpu_draft(drafting: int, width: int, longest: int) -> float:
    return 2.0 + 0.3 * drafting + 0.15 * drafting * width + 0.33 * min(width, longest + 1)


def _cpu_verify(batch: int, rows: int) -> float:
    return 2.6 + 0.73 * batch + 0.27 * (rows - batch)


def _gpu_verify(batch: int, rows: int) -> float:
    del batch
    return 8.0 + 0.25 * max(0, rows - 16)


MACHINES: dict[str, Machine] = {
    "cpu": Machine(_cpu_verify, _cpu_draft),
    "cpu, noisy": Machine(_cpu_verify, _cpu_draft, noise=0.2, hiccups=0.04),
    "cpu, slowed": Machine(_cpu_verify, _cpu_draft, slowdown=1.7),
    "gpu": Machine(_gpu_verify, lambda batch, width, _: 0.55 * _gpu_verify(batch, batch * width)),
    "lookup": Machine(_gpu_verify, lambda batch, *_: 0.01 * batch),
    "tiles": Machine(
        lambda _, rows: 4.0 + 3.0 * math.ceil(rows / 16),
        lambda batch, width, _: 2.0 + 1.5 * math.ceil(batch * width / 16),
    ),
    "rows cost": Machine(lambda _, rows: 1.0 + 2.0 * rows, lambda batch, width, _: 0.5 + 1.0 * batch * width),
}

# --- runs -------------------------------------------------------------------------------------------------------


def coming_and_going(duration: float, seed: int) -> list[tuple[float, int]]:
    """From when on how many clients there are: they come in a Poisson process and stay for an exponential time."""
    chance = random.Random(seed)
    now, clients = 0.0, 1
    changes = [(now, clients)]
    arrivals, stay = 60.0 / duration, duration / 6.0
    while now < duration:
        rate = arrivals + clients / stay
        now += chance.expovariate(rate)
        clients += 1 if chance.random() < arrivals / rate else -1
        clients = max(1, min(MOST_CLIENTS, clients))
        changes.append((now, clients))
    return changes


@dataclass(frozen=True)
class Trace:
    """What a policy is put to: `clients` is their number, or 0 where they come and go; `most`, the widest draft."""

    machine: str
    text: str
    clients: int
    most: int = 6
    steps: int = 2000
    """About how many steps the widest drafts make."""
    draw: int = 0
    """Which texts, noise and arrivals of their kind."""

    def regret(self, policy: Policy) -> float:
        """The share of the best fixed width's tokens that a policy misses in the same time."""
        return 1.0 - self.tokens(policy) / max(self.tokens(Fixed(width)) for width in range(self.most + 1))

    def tokens(self, policy: Policy) -> int:
        machine, clients = MACHINES[self.machine], self.clients or MOST_CLIENTS // 3
        first = self.draw * MOST_CLIENTS
        texts = [_texts(self.text, first + client) for client in range(self.clients or MOST_CLIENTS)]
        duration = self.steps * machine.seconds(clients, clients * (1 + self.most), clients, self.most, self.most)
        load = [(0.0, self.clients)] if self.clients else coming_and_going(duration, self.draw)
        moods = _moods(machine.noise, machine.hiccups, self.draw)
        places = [0] * len(texts)
        now, steps, tokens = 0.0, 0, 0
        changes = iter([*load[1:], (math.inf, 0)])
        batch, (change, following) = load[0][1], next(changes)
        while now < duration:
            while now >= change:
                batch, (change, following) = following, next(changes)
            width = policy.width(batch)
            step = _step(texts, places, batch, width)
            seconds = (
                machine.seconds(batch, step.rows, len(step.accepted), width, step.longest) * moods[steps % len(moods)]
            )
            if now > duration / 2:
                seconds *= machine.slowdown
            if step.accepted:
                policy.observe(batch, width, seconds, step.accepted, step.others)
            now += seconds
            steps += 1
            tokens += sum(step.accepted) + len(step.accepted) + step.others
        return tokens


class _Step(NamedTuple):
    rows: int
    longest: int
    accepted: list[int]
    others: int


def _step(texts: SequenceOf[Text], places: list[int], batch: int, width: int) -> _Step:
    """Take the first `batch` texts on by a step."""
    rows, longest, others = batch, 0, 0
    accepted: list[int] = []
    for client in range(batch):
        drafted, right, looked_up = texts[client][places[client] % len(texts[client])]
        if looked_up is None:
            drafted = min(drafted, width)
            right = min(right, drafted)
            accepted.append(right)
            longest = max(longest, drafted)
        else:
            drafted, right = LOOKUP_WIDTH, looked_up
            others += right + 1
        places[client] += right + 1
        rows += drafted
    return _Step(rows, longest, accepted, others)


@lru_cache(MOST_CLIENTS * len(TEXTS))
def _texts(name: str, client: int) -> Text:
    return TEXTS[name](client)


@cache
def _moods(noise: float, hiccups: float, draw: int) -> list[float]:
    """What the time of each step is multiplied by."""
    chance = random.Random(draw)
    moods = [math.exp(chance.gauss(0.0, noise)) for _ in range(4093)]
    every = round(1.0 / hiccups)
    for start in range(0, len(moods) - every, every):
        moods[chance.randrange(start, start + every)] *= chance.uniform(2.0, 12.0)
    return moods
