"""The one acceptance rule. Pure Python."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Verdict(NamedTuple):
    """What a verified draft comes to.

    `accepted` counts the emitted tokens that were drafted; `emitted` is never empty.
    """

    emitted: list[int]
    accepted: int


def accept(draft: Sequence[int], chosen: Sequence[int], ends: Collection[int], room: int) -> Verdict:
    """Keep the verifier's choices as far as the draft foresaw them, and one more.

    `chosen[j]` is what the verifier chooses given the draft's first j tokens, so it is
    valid while those were its own choices. A draft only decides how many choices are
    valid at once: it never contributes a token.

    Args:
        draft: j drafted tokens.
        chosen: j + 1 choices of the verifier.
        ends: tokens that end the output (they are emitted, nothing after them is).
        room: at most this many tokens are emitted (at least 1).
    """
    accepted = 0
    while accepted < len(draft) and draft[accepted] == chosen[accepted]:
        accepted += 1
    emitted = list(chosen[: min(accepted + 1, room)])
    for place, token in enumerate(emitted):
        if token in ends:
            del emitted[place + 1 :]
            break
    return Verdict(emitted, min(accepted, len(emitted)))
