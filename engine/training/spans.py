"""Batches out of token streams: which spans a step trains on depends on nothing but its number."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

FIM_ONE_IN = 4
"""Of the Python spans, so many are in fill-in-the-middle order."""


@dataclass(frozen=True, slots=True)
class FimTokens:
    """The special tokens of fill-in-the-middle (arXiv 2207.14255)."""

    prefix: int
    suffix: int
    middle: int
    end: int

    def reorder(self, span: Tensor, chooser: random.Random) -> Tensor:
        """span [L] to [L]: prefix, suffix, middle; the last 4 tokens make room for the special ones."""
        body = span[: len(span) - 4]
        start, end = sorted(chooser.sample(range(len(body) + 1), 2))
        marks = [span.new_tensor([token]) for token in (self.prefix, self.suffix, self.middle, self.end)]
        return torch.cat((marks[0], body[:start], marks[1], body[end:], marks[2], body[start:end], marks[3]))


class Spans:
    """The sequences of a training, by number.

    Of each kind, an epoch goes once over its stream, cut into spans at an offset of its own, in an order of its own.

    Args:
        streams: tokens [N] of any integer type, of "python" and of "stories".
        python_share: what part of the sequences is Python.
        length: tokens of a span that are predicted.
        fim: if the tokenizer has such tokens, for spans of Python.
    """

    def __init__(
        self,
        streams: Mapping[str, Tensor],
        python_share: Fraction,
        length: int,
        seed: int,
        fim: FimTokens | None,
    ) -> None:
        self._streams, self._python_share = streams, python_share
        self._length, self._seed, self._fim = length, seed, fim
        self._orders: dict[str, tuple[int, int, list[int]]] = {}

    def batch(self, step: int, size: int) -> Tensor:
        """The sequences of a step, int64 [size, length + 1]."""
        return torch.stack([self._sequence(number) for number in range(step * size, (step + 1) * size)])

    def openings(self, kind: str, step: int, size: int, length: int) -> Tensor:
        """Beginnings of spans of one kind, int64 [size, length], in their own order."""
        return torch.stack([self._span(kind, place)[:length] for place in range(step * size, (step + 1) * size)])

    def _sequence(self, number: int) -> Tensor:
        kind, place = self._kind(number)
        span = self._span(kind, place)
        chooser = random.Random(f"{self._seed} {kind} {place}")
        if self._fim is None or kind != "python" or chooser.randrange(FIM_ONE_IN):
            return span
        return self._fim.reorder(span, chooser)

    def _kind(self, number: int) -> tuple[str, int]:
        """Of which kind a sequence is, and how many of that kind come before it; the kinds alternate evenly."""
        before, upto = (int(n * self._python_share) for n in (number, number + 1))
        return ("python", before) if upto > before else ("stories", number - before)

    def _span(self, kind: str, place: int) -> Tensor:
        stream = self._streams[kind]
        count = (len(stream) - 1) // self._length - 1  # one less, so that every offset leaves as many
        epoch, place = divmod(place, count)
        offset, order = self._order(kind, epoch, count)
        start = offset + order[place] * self._length
        return stream[start : start + self._length + 1].long()

    def _order(self, kind: str, epoch: int, count: int) -> tuple[int, list[int]]:
        if kind not in self._orders or self._orders[kind][0] != epoch:
            chooser = random.Random(f"{self._seed} {kind} epoch {epoch}")
            self._orders[kind] = (epoch, chooser.randrange(self._length), chooser.sample(range(count), count))
        return self._orders[kind][1:]


def held_out_spans(stream: Tensor, length: int, count: int) -> Tensor:
    """Up to `count` spans of a stream, evenly spread over it, int64 [count, length + 1]."""
    whole = (len(stream) - 1) // length
    count = min(count, whole)
    starts = [i * whole // count * length for i in range(count)]
    return torch.stack([stream[start : start + length + 1].long() for start in starts])
