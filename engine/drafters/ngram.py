"""Prompt lookup: what followed the last few tokens when they occurred before, follows again.

After the idea of prompt lookup decoding (A. Saxena, 2023). It costs no pass of the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

from skippy.engine.sequence import Sequence

MIN_MATCH = 2
MAX_MATCH = 8
_ITEM = array("i").itemsize


class NgramDrafter:
    """Looks up the longest recent repetition of a sequence's end in the sequence itself.

    Drafted rows are not quite free, so a sequence whose drafts keep failing must repeat
    itself at greater length before the next one: one token more per draft in vain.
    """

    name = "ngram"

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [
            lookup(sequence.tokens, limit, MIN_MATCH + sequence.misses)
            for sequence, limit in zip(sequences, limits, strict=True)
        ]


def lookup(tokens: SequenceOf[int], limit: int, min_match: int) -> list[int]:
    """At most `limit` tokens that followed the latest earlier occurrence of the longest known suffix.

    A suffix counts from `min_match` tokens on; if none that long occurred before, []. Where
    the history ends, it is taken to go round: a loop is foreseen as far as the limit goes.
    """
    if limit < 1 or len(tokens) <= min_match:
        return []
    history = array("i", tokens).tobytes()
    # Whatever repeats at length also repeats in short, so the usual answer, no, comes first.
    size, start = min_match, _find_last(history, min_match)
    if start < 0:
        return []
    for longer in range(min(MAX_MATCH, len(tokens) - 1), min_match, -1):
        at = _find_last(history, longer)
        if at >= 0:
            size, start = longer, at
            break
    follower = start + size
    period = len(tokens) - follower
    return [tokens[follower + i % period] for i in range(limit)]


def _find_last(history: bytes, size: int) -> int:
    """Where the last `size` items occurred before, as an item index; -1 if nowhere."""
    suffix = history[-size * _ITEM :]
    end = len(history) - _ITEM
    while True:
        at = history.rfind(suffix, 0, end)
        if at < 0 or at % _ITEM == 0:
            return at // _ITEM if at >= 0 else -1
        end = at + len(suffix) - 1
