"""What one pass computes, as tensors. The shape stands beside every field."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The rows of one pass, those of a sequence side by side in order of position.

    Rows beyond the last segment are padding: they compute nonsense that nobody reads.
    """

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    slots: Tensor  # [N] int64, where in the pool each row writes its K and V
    segments: list[Segment]
    logit_rows: Tensor  # [M] int64, the rows that reach lm_head


def to_device(values: list[int], device: torch.device) -> Tensor:
    """[len(values)] int64."""
    return torch.tensor(values, dtype=torch.int64, device=device)
