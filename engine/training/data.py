"""Training text: what the base model itself writes.

The drafter has to foresee the model, not the world, so the model's own continuations are
all it needs to learn from. Each sequence is an opening (a given prompt, or what the model
writes after its begin-of-text token at temperature 1) and a continuation of it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.engine import Engine
from skippy.engine.prompts import Line
from skippy.engine.training.options import AT_ONCE
from skippy.engine.types import Request, SamplingParams

TEMPERATURES = (0.0, 0.0, 0.8, 1.0)
"""Of the continuations, in turn. A drafter is judged on greedy text as on sampled text."""
FREE_EVERY = 4
"""One sequence of so many has an opening of the model's own even if there are prompts for all: what is given is not
all that it will be asked."""
SHORTEST_OPENING = 8
"""Tokens that the model writes of an opening of its own, at least; half of the length at most."""
GRAM = 13
"""Words in a row that a training text must not share with an evaluation text (arXiv 2005.14165, appendix C)."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """A training text: `tokens[start:]` was chosen by the model at `temperature` under `seed`."""

    tokens: list[int]
    start: int
    temperature: float
    seed: int


def generate_samples(
    engine: Engine, prompts: Iterable[Sequence[int]], count: int, length: int, seed: int, progress: Progress
) -> list[Sample]:
    """`count` sequences of `length` tokens, the same ones for the same arguments, on a CPU to the bit.

    Half of them are greedy and repeat themselves, so drafts pay, as far as the controller finds.

    Args:
        engine: one that shares drafts among requests.
        prompts: openings for all but one of FREE_EVERY sequences, cut to half of `length`. Each is
            used once, so that no sequence is there twice.
        progress: told now and then how many sequences are done.
    """
    chooser = random.Random(seed)
    openings: list[list[int]] = [[] for _ in range(count)]
    places = [place for place in range(count) if place % FREE_EVERY]
    given = list(dict.fromkeys(tuple(prompt[: length // 2]) for prompt in prompts))
    used = min(len(given), len(places))
    for place, prompt in zip(chooser.sample(places, used), chooser.sample(given, used), strict=True):
        openings[place] = list(prompt)
    free: dict[int, Request] = {}
    for place, opening in enumerate(openings):
        if not opening:
            opening.append(_first_token(engine, chooser))
            extra = chooser.randint(SHORTEST_OPENING, max(SHORTEST_OPENING, length // 2 - 1))
            free[place] = _request(place, opening, extra, 1.0, chooser.getrandbits(62))
    for place, written in _write(engine, free.values(), lambda _: None).items():
        openings[place] += written
    seeds = [chooser.getrandbits(62) for _ in openings]
    continued = _write(
        engine,
        [
            _request(place, opening, length - len(opening), temperature_of(place), seeds[place])
            for place, opening in enumerate(openings)
        ],
        progress,
    )
    return [
        Sample(opening + continued[place], len(opening), temperature_of(place), seeds[place])
        for place, opening in enumerate(openings)
    ]


def temperature_of(place: int) -> float:
    """The temperature of a continuation; of each as many have an opening of the model's own."""
    return TEMPERATURES[(place + place // FREE_EVERY) % len(TEMPERATURES)]


def most_frequent(samples: Iterable[Sample], count: int, vocab_size: int) -> Tensor:
    """[count] int64: the tokens that occur most, of as many as needed that do not occur those with the lowest ids."""
    tokens = torch.tensor([token for sample in samples for token in sample.tokens])
    return tokens.bincount(minlength=vocab_size).argsort(descending=True, stable=True)[:count]


class Problem(Line):
    """A line of a file of evaluation problems."""

    canonical_solution: str = ""
    entry_point: str | None = None

    @property
    def texts(self) -> list[str]:
        """What no text that is trained on may overlap with: the prompt with its solution, and the turns."""
        return [(self.prompt or "") + self.canonical_solution, *(self.turns or ())]


def grams(text: str) -> set[tuple[str, ...]]:
    """Every run of GRAM words of a text, in lower case."""
    words = text.lower().split()
    return set(zip(*(words[i:] for i in range(GRAM)), strict=False))


def without_overlap(
    samples: Iterable[Sample], decode: Callable[[list[int]], str], excluded: Iterable[str]
) -> list[Sample]:
    """Those samples whose text shares no GRAM words in a row with any excluded text."""
    banned = set().union(*(grams(text) for text in excluded))
    return [sample for sample in samples if not grams(decode(sample.tokens)) & banned]


def _first_token(engine: Engine, chooser: random.Random) -> int:
    begin = engine.info.bos_token_id
    return chooser.randrange(engine.info.vocab_size) if begin is None else begin


def _request(place: int, opening: Sequence[int], count: int, temperature: float, seed: int) -> Request:
    params = SamplingParams(max_tokens=count, temperature=temperature, seed=seed, ignore_eos=True)
    return Request(str(place), tuple(opening), params, drafter=HybridDrafter.name)


def _write(engine: Engine, requests: Iterable[Request], progress: Progress) -> dict[int, list[int]]:
    """What the engine writes for each request, by its place."""
    written: defaultdict[int, list[int]] = defaultdict(list)
    done = 0
    for step in engine.run(requests, AT_ONCE):
        for output in step.outputs:
            written[int(output.request_id)] += output.token_ids
            if output.finish_reason is not None:
                done += 1
                progress(done)
    return written
