"""What every drafter is."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from skippy.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


class Drafter(Protocol):
    """Proposes tokens; a wrong proposal costs time and nothing else."""

    @property
    def name(self) -> str: ...

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        """At most limits[i] tokens to follow sequences[i], each list possibly empty.

        Every sequence has `computed == len(tokens) - 1`, and KV slots for its newest token
        and limits[i] more: a drafter that runs the model may use them as scratch.
        """
        ...


class Followed(NamedTuple):
    """Rows of a verify pass that stand: known tokens and accepted drafts of one sequence."""

    sequence: Sequence
    row: int
    """The first of the rows in the pass."""
    position: int
    """Its position. What follows the last of the rows is known, too."""
    num_rows: int


@runtime_checkable
class Follower(Protocol):
    """A drafter that computes something of its own for every token that the verifier computes."""

    @property
    def taps(self) -> SequenceOf[int]:
        """The layers whose input it wants to see."""
        ...

    def follow(self, parts: SequenceOf[Followed], tapped: Mapping[int, Tensor]) -> None:
        """What the last pass computed; tapped by layer, what entered it, [rows of the pass, hidden_size]."""
        ...


@runtime_checkable
class Reader(Protocol):
    """A drafter that learns from the logits of the verify pass."""

    def read(self, tokens: SequenceOf[int], logits: Tensor) -> None:
        """What the last pass made of its sequences' tokens and drafts, as far as it computed logits.

        logits [len(tokens), vocabulary] float32, raw: row i is of what follows tokens[i] in its text.
        """
        ...


@runtime_checkable
class Keeper(Protocol):
    """A drafter that keeps something for each sequence while it lives."""

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended; its tokens will not change any more."""
        ...

    def forget(self) -> None:
        """Forget what was learnt of sequences that have ended."""
        ...
