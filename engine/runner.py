"""Sequences to rows, rows to logits: one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from skippy.engine.attention import AttentionBackend
from skippy.engine.kv import KVPool
from skippy.engine.linear import Tiling
from skippy.engine.model import Adapter, CausalLM, Plan
from skippy.engine.tensors import Segment, TokenBatch, to_device


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence to be computed.

    The last `num_logits` of them get logits. `gate_from` is the first row, counted from the
    start of these, that the adapter applies to; None for no row.
    """

    tokens: SequenceOf[int]
    position: int
    table: list[int]
    num_logits: int
    gate_from: int | None = None


class Runner:
    """Runs passes of one model over one pool."""

    def __init__(self, model: CausalLM, pool: KVPool, attention: AttentionBackend, tiling: Tiling) -> None:
        self.model = model
        self.pool = pool
        self._attention = attention
        self._tiling = tiling

    @torch.inference_mode()
    def run(self, rows: SequenceOf[Rows], plan: Plan, adapter: Adapter | None = None) -> Tensor:
        """Compute the rows and cache their KV at the layers of `plan`.

        Returns float32 logits of the rows that asked for them, in order, [sum of num_logits, vocabulary].
        """
        batch, num_logits = self._batch(rows)
        hidden: Tensor = self.model(batch, plan, self._attention.begin(batch.segments, batch.slots), adapter)
        if num_logits == 0:
            return hidden.new_empty(0, 0, dtype=torch.float32)
        return self.model.logits(hidden[batch.logit_rows])[:num_logits]

    def _batch(self, rows: SequenceOf[Rows]) -> tuple[TokenBatch, int]:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        logit_rows: list[int] = []
        gate: list[int] = []
        size = self.pool.block_size
        for part in rows:
            first, end = len(token_ids), part.position + len(part.tokens)
            token_ids += part.tokens
            positions += range(part.position, end)
            for start in (part.position, *range((part.position // size + 1) * size, end, size)):
                stop = min(end, (start // size + 1) * size)
                slot = self.pool.slot(part.table, start)
                slots += range(slot, slot + stop - start)
                table = part.table[: start // size + 1]
                segments.append(Segment(first + start - part.position, stop - start, start, table))
            logit_rows += range(len(token_ids) - part.num_logits, len(token_ids))
            if part.gate_from is not None:
                gate += range(first + part.gate_from, len(token_ids))
        num_logits = len(logit_rows)
        padding = self._tiling.padded(len(token_ids) + self._attention.slack_rows) - len(token_ids)
        token_ids += [0] * padding
        positions += [0] * padding
        slots += [self.pool.padding_slot] * padding
        logit_rows += [0] * (self._tiling.padded(num_logits) - num_logits)
        device = self.pool.keys.device
        batch = TokenBatch(
            token_ids=to_device(token_ids, device),
            positions=to_device(positions, device),
            slots=to_device(slots, device),
            segments=segments,
            logit_rows=to_device(logit_rows, device),
            adapter_gate=self._gate(gate, len(token_ids)) if gate else None,
        )
        return batch, num_logits

    def _gate(self, rows: list[int], num_rows: int) -> Tensor:
        gate = torch.zeros(num_rows, 1, dtype=self.pool.keys.dtype, device=self.pool.keys.device)
        gate[rows] = 1
        return gate
