"""Sequences to rows, rows to logits: one pass of the model."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skippy.engine.attention import PassAttention, SDPAAttention
from skippy.engine.kv import KVPool
from skippy.engine.linear import Tiling
from skippy.engine.model import Adapter, CausalLM
from skippy.engine.shape import Plan
from skippy.engine.tensors import RiderSegment, Segment, TokenBatch, to_device


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence to be computed; the last `num_logits` of them are read.

    Behind each of the last `num_ridden` rows ride the masks of `riders`, at the positions that
    follow the row's. Their KV goes to the slots behind those of all the rows.
    """

    tokens: SequenceOf[int]
    position: int
    table: list[int]
    num_logits: int
    riders: SequenceOf[int] = ()
    num_ridden: int = 0

    @property
    def end(self) -> int:
        return self.position + len(self.tokens)


class Computed(NamedTuple):
    """What a pass leaves besides KV."""

    hidden: Tensor  # [M, hidden_size], the last hidden states of the rows that are read, not normalised
    riders: Tensor  # [R, hidden_size], the last hidden states of all riders
    tapped: dict[int, Tensor]  # by layer, what entered it, of every row of the pass, [N, hidden_size]


class Runner:
    """Runs passes of one model over one pool."""

    def __init__(self, model: CausalLM, pool: KVPool, attention: SDPAAttention, tiling: Tiling) -> None:
        self.model = model
        self.pool = pool
        self._attention = attention
        self._tiling = tiling

    def run(self, rows: SequenceOf[Rows], plan: Plan, adapter: Adapter | None = None) -> Tensor:
        """Compute the rows and cache their KV at the layers of `plan`.

        Returns float32 logits of the rows that asked for them, in order, [sum of num_logits, vocabulary].
        """
        return self.logits(self.compute(rows, plan, adapter).hidden)

    @torch.inference_mode()
    def compute(
        self, rows: SequenceOf[Rows], plan: Plan, adapter: Adapter | None = None, taps: Collection[int] = ()
    ) -> Computed:
        """Compute the rows and cache their KV at the layers of `plan`.

        Args:
            adapter: made for a pass in which the riders' rows follow all others.
            taps: layers whose input is wanted.
        """
        batch = self.batch(rows)
        attend = self.attend(batch, None if adapter is None else adapter.first_row)
        hidden, tapped = self.model(batch, plan, attend, adapter, taps)
        return Computed(hidden[batch.logit_rows], hidden[batch.rider_rows], tapped)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden_size], as `compute` returns it, to [M, vocabulary] float32."""
        count = len(hidden)
        if count == 0:
            return hidden.new_empty(0, 0, dtype=torch.float32)
        padding = self._tiling.padded(count) - count
        if padding:
            hidden = torch.cat((hidden, hidden.new_zeros(padding, hidden.shape[1])))
        logits: Tensor = self.model.logits(hidden)
        return logits[:count]

    def attend(self, batch: TokenBatch, first_draft: int | None) -> PassAttention:
        """The attention of one pass; see `SDPAAttention.begin`."""
        return self._attention.begin(batch.segments, batch.slots, batch.riders, first_draft)

    def batch(self, rows: SequenceOf[Rows]) -> TokenBatch:
        """The rows as tensors, padded."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        logit_rows: list[int] = []
        size = self.pool.block_size
        for part in rows:
            first, end = len(token_ids), part.end
            token_ids += part.tokens
            positions += range(part.position, end)
            slots += self.pool.slots(part.table, part.position, end)
            for start in (part.position, *range((part.position // size + 1) * size, end, size)):
                stop = min(end, (start // size + 1) * size)
                table = part.table[: start // size + 1]
                segments.append(Segment(first + start - part.position, stop - start, start, table))
            logit_rows += range(len(token_ids) - part.num_logits, len(token_ids))
        riders: list[RiderSegment] = []
        last = self.model.max_len - 1  # what rides beyond drafts tokens that can never be
        for part in rows:
            if part.riders:
                width, end = len(part.riders), part.end
                stop = end + part.num_ridden * width
                table, ridden = part.table[: -(-stop // size)], range(end - part.num_ridden, end)
                riders.append(RiderSegment(len(token_ids), width, len(ridden), ridden.start, table))
                token_ids += [*part.riders] * len(ridden)
                positions += [min(row + 1 + place, last) for row in ridden for place in range(width)]
                slots += self.pool.slots(table, end, stop)
        needed = max(len(token_ids), self._attention.rows_read(segments))  # riders may be the padding
        padding = self._tiling.padded(needed) - len(token_ids)
        token_ids += [0] * padding
        positions += [0] * padding
        slots += [self.pool.padding_slot] * padding
        device = self.pool.keys.device
        return TokenBatch(
            token_ids=to_device(token_ids, device),
            positions=to_device(positions, device),
            slots=to_device(slots, device),
            segments=segments,
            logit_rows=to_device(logit_rows, device),
            riders=riders,
        )
