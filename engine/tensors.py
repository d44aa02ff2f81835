"""What one pass computes, as tensors. The shape stands beside every field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive rows of one sequence whose positions share a KV block."""

    row: int
    """The first of the rows."""
    num_rows: int
    position: int
    """The position of the first row."""
    table: list[int]
    """Every block of the sequence up to and including theirs."""


class RiderSegment(NamedTuple):
    """The riders of one sequence: `width` mask rows behind each of some of its rows.

    Row a of the ridden ones has the riders row + a * width and following. They see what it
    sees, itself included, and those of their own that precede them.
    """

    row: int
    """The first of the riders."""
    width: int
    num_ridden: int
    position: int
    """The position of the first ridden row. The riders' slots follow those of the ridden rows."""
    table: list[int]
    """Every block of the sequence up to and including the riders'."""

    @property
    def num_rows(self) -> int:
        return self.num_ridden * self.width


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The rows of one pass, those of a sequence side by side in order of position; then riders.

    Rows beyond those are padding: they compute nonsense that nobody reads.
    """

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    slots: Tensor  # [N] int64, where in the pool each row writes its K and V
    segments: list[Segment]
    logit_rows: Tensor  # [M] int64, the rows that reach lm_head
    riders: list[RiderSegment] = field(default_factory=list)

    @property
    def rider_rows(self) -> slice:
        """All riders, side by side."""
        if not self.riders:
            return slice(0, 0)
        return slice(self.riders[0].row, self.riders[-1].row + self.riders[-1].num_rows)


def to_device(values: list[int], device: torch.device) -> Tensor:
    """[len(values)] int64."""
    return torch.tensor(values, dtype=torch.int64, device=device)
