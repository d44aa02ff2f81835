"""Training text: what the base model itself writes.

The drafter has to foresee the model, not the world, so the model's own continuations are
all it needs to learn from. Each sequence is an opening (a given prompt, or what the model
writes after its begin-of-text token at temperature 1) and a continuation of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from skippy.engine.engine import Engine
from skippy.engine.types import Request, SamplingParams

TEMPERATURES = (0.0, 0.0, 0.8, 1.0)
"""Of the continuations, in turn. A drafter is judged on greedy text as on sampled text."""
AT_ONCE = 64
GRAM = 13
"""Words in a row that a training text must not share with an evaluation text (arXiv 2005.14165, appendix C)."""

Progress = Callable[[int], None]


def generate_sequences(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int, length: int, seed: int, progress: Progress
) -> list[list[int]]:
    """`count` sequences of `length` tokens, the same ones for the same arguments.

    Args:
        prompts: openings for half of the sequences, cut to half of `length`; without any,
            the model writes every opening.
        progress: told now and then how many sequences are done.
    """
    chooser = random.Random(seed)
    openings: list[tuple[int, ...]] = []
    for index in range(count):
        if prompts and index % 2:
            openings.append(tuple(chooser.choice(prompts)[: length // 2]))
        else:
            openings.append((_first_token(engine, chooser),))
    free = [chooser.randrange(8, length // 2) if len(opening) == 1 else 0 for opening in openings]
    begun = _continue(
        engine,
        [
            Request(str(i), opening, _params(extra, 1.0, seed + i))
            for i, (opening, extra) in enumerate(zip(openings, free, strict=True))
            if extra
        ],
        lambda _: None,
    )
    starts = [[*opening, *begun.get(str(i), ())] for i, opening in enumerate(openings)]
    written = _continue(
        engine,
        [
            Request(str(i), tuple(start), _params(length - len(start), TEMPERATURES[i // 2 % 4], seed + count + i))
            for i, start in enumerate(starts)
        ],
        progress,
    )
    return [start + written[str(i)] for i, start in enumerate(starts)]


def grams(text: str) -> set[tuple[str, ...]]:
    """Every run of GRAM words of a text, in lower case."""
    words = text.lower().split()
    return set(zip(*(words[i:] for i in range(GRAM)), strict=False))


def without_overlap(sequences: Iterable[tuple[list[int], str]], excluded: Iterable[str]) -> list[list[int]]:
    """Those sequences whose text shares no GRAM words in a row with any excluded text."""
    banned = set().union(*(grams(text) for text in excluded))
    return [tokens for tokens, text in sequences if not grams(text) & banned]


def _first_token(engine: Engine, chooser: random.Random) -> int:
    begin = engine.info.bos_token_id
    if begin is None:
        return chooser.randrange(engine.info.vocab_size)
    return begin


def _params(max_tokens: int, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)


def _continue(engine: Engine, requests: list[Request], progress: Progress) -> dict[str, list[int]]:
    written: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting, live, done = requests[::-1], 0, 0
    while waiting or live:
        while waiting and live < AT_ONCE:
            engine.add(waiting.pop())
            live += 1
        for output in engine.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            written[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                live, done = live - 1, done + 1
                progress(done)
    return written
