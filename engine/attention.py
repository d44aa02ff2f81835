"""Attention over the paged pool. The protocol, and the reference on PyTorch's SDPA.

Exactness: the result of a row depends on its own position and nothing else. Rows are cut
where a KV block ends, so a row at position p always reads (p // block_size + 1) whole
blocks, whoever shares the pass; slots beyond p are masked. Row counts are padded to a
multiple that was measured to give every row the same bits (see `linear`). A padding row
is simply the next row of the pass, read along and thrown away.

Riders (see `tensors.RiderSegment`) come behind all these rows and are read by none of them.
Their tokens are drafts, so their bits need not be the same in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.kv import KVPool
from skippy.engine.linear import MULTIPLES
from skippy.engine.tensors import RiderSegment, Segment


class PassAttention(Protocol):
    """Attention of one pass: made once, called by every layer that the pass runs through."""

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Cache this layer's keys and values, then attend.

        queries [N, heads, head_dim], where head h reads KV head h % kv_heads; keys_values
        [N, 2 * kv_heads, head_dim]; to [N, heads * head_dim]. Rows beyond the segments come
        out as zeros or nonsense.
        """
        ...


class AttentionBackend(Protocol):
    def begin(
        self,
        segments: list[Segment],
        slots: Tensor,
        riders: Sequence[RiderSegment] = (),
        first_draft: int | None = None,
    ) -> PassAttention:
        """first_draft: the rows from there on are a drafter's; what they cache stays finite."""
        ...

    @property
    def slack_rows(self) -> int:
        """How many rows a batch must have beyond its last segment."""
        ...


class SDPAAttention:
    """The reference backend: `scaled_dot_product_attention`, segment by segment.

    Args:
        max_len: the longest sequence, in tokens.
    """

    def __init__(self, pool: KVPool, num_heads: int, max_len: int, scale: float) -> None:
        self.pool = pool
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = pool.keys.shape[2:]
        self.group = num_heads // self.num_kv_heads
        self.scale = scale
        self._max_base = -(-max_len // pool.block_size) * pool.block_size
        self._mask = self._mask_table()
        self.multiple = self._measure_multiple()

    @property
    def slack_rows(self) -> int:
        return self.multiple - 1

    def begin(
        self,
        segments: list[Segment],
        slots: Tensor,
        riders: Sequence[RiderSegment] = (),
        first_draft: int | None = None,
    ) -> PassAttention:
        return _SDPAPass(self, segments, slots, riders, first_draft)

    def mask(self, position: int, rows: int) -> Tensor:
        """Additive causal mask [rows * group, slots] of `rows` rows from `position` on.

        Slots end with the block of `position`. A view: column x of the table stands for
        slot x - (max_base - base), row r for offset r within the block.
        """
        offset = position % self.pool.block_size
        base = position - offset
        return self._mask[offset * self.group : (offset + rows) * self.group, self._max_base - base :]

    def rider_mask(self, riders: RiderSegment) -> Tensor:
        """Additive mask [riders * group, slots]. What precedes the ridden rows is seen by all."""
        size, keys = self.pool.block_size, self.pool.keys
        near = _ancestor_mask(riders.num_ridden, riders.width, size, self.group, keys.dtype, keys.device)
        slots = len(riders.table) * size
        return F.pad(near[:, : slots - riders.position], (riders.position, 0))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [1, kv_heads, rows * group, head_dim]; keys, values [1, kv_heads, slots, head_dim]."""
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)

    def _mask_table(self) -> Tensor:
        size, device = self.pool.block_size, self.pool.keys.device
        # Padding rows may reach past the block's last row; they see every slot.
        row = torch.arange(size + max(MULTIPLES), device=device)[:, None]
        column = torch.arange(self._max_base + size, device=device)[None, :]
        mask = torch.zeros(len(row), column.shape[1], dtype=self.pool.keys.dtype, device=device)
        mask.masked_fill_(column > self._max_base + row, float("-inf"))
        return mask.repeat_interleave(self.group, dim=0)

    def _measure_multiple(self) -> int:
        """The smallest multiple of rows for which every row comes out the same, to the bit."""
        if self.pool.keys.device.type != "cpu":
            return 1
        size = self.pool.block_size
        # Every length a few blocks long, then some: kernels change with the length, too.
        lengths = [blocks * size for blocks in (*range(1, 9), 12, 16, 24, 33, 64) if blocks * size <= self._max_base]
        probes = [probe for length in lengths for probe in self._probes(length)]
        for multiple in MULTIPLES:
            if all(self._rows_agree(multiple, *probe) for probe in probes):
                return multiple
        return max(MULTIPLES)

    def _probes(self, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values in which the order of summation shows, even in bfloat16.

        Rounding to bfloat16 hides most of it, so one probe has scores that cancel, rounding
        errors magnified, and the other equal scores and values that cancel before the last block.
        """
        size, dtype = self.pool.block_size, self.pool.keys.dtype
        generator = torch.Generator().manual_seed(0)

        def random(rows: int) -> Tensor:
            return torch.randn(1, self.num_kv_heads, rows, self.head_dim, generator=generator).to(dtype)

        queries, keys, values = random((size + max(MULTIPLES)) * self.group), random(length), random(length)
        half = self.head_dim // 2
        crossed = (
            torch.cat((queries[..., :half], queries[..., :half].flip(-1)), -1) * 1024,
            torch.cat((keys[..., :half], -keys[..., :half].flip(-1)), -1) * 1024,
            values,
        )
        balanced = torch.cat((values[:, :, :-size], -values[:, :, :-size].flip(2), values[:, :, -size:] * 2**-16), 2)
        flat = (torch.zeros_like(queries), torch.cat((keys[:, :, :-size], keys), 2), balanced)
        return [crossed, flat] if balanced.shape[2] <= self._max_base else [crossed]

    def _rows_agree(self, multiple: int, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether runs of `multiple` rows from anywhere, and of its multiples, agree with a whole block."""
        size, group = self.pool.block_size, self.group

        def attend(start: int, count: int) -> Tensor:
            part = slice(start * group, (start + count) * group)
            mask = self.mask(keys.shape[2] - size + start, count)
            return self.attend(queries[:, :, part], keys, values, mask)[:, :, : (size - start) * group]

        whole = attend(0, size)
        runs = [(start, multiple) for start in range(size)] + [(0, n) for n in range(multiple, size + 1, multiple)]
        return all(
            torch.equal(attend(start, count), whole[:, :, start * group : (start + count) * group])
            for start, count in runs
        )


class _SDPAPass:
    def __init__(
        self,
        backend: SDPAAttention,
        segments: list[Segment],
        slots: Tensor,
        riders: Sequence[RiderSegment],
        first_draft: int | None,
    ) -> None:
        self._backend = backend
        self._slots = slots
        self._parts = []
        for segment in segments:
            rows = -(-segment.num_rows // backend.multiple) * backend.multiple
            self._parts.append(
                (
                    slice(segment.row * backend.group, (segment.row + segment.num_rows) * backend.group),
                    slice(segment.row * backend.group, (segment.row + rows) * backend.group),
                    backend.pool.locate(segment.table),
                    backend.mask(segment.position, rows),
                )
            )
        for part in riders:
            own = slice(part.row * backend.group, (part.row + part.num_rows) * backend.group)
            self._parts.append((own, own, backend.pool.locate(part.table), backend.rider_mask(part)))
        self._first_draft = first_draft
        # The usual step of a single client: one segment, padded, is the whole batch.
        self._alone = len(self._parts) == 1 and self._parts[0][1] == slice(0, len(slots) * backend.group)

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        backend = self._backend
        if self._first_draft is not None:
            # Others read these slots masked, which does not help against NaN; no adapter may break their rows.
            keys_values[self._first_draft :].nan_to_num_(0.0, 0.0, 0.0)
        backend.pool.write(layer, self._slots, keys_values)
        # Heads that share a KV head become rows of one product: [1, kv_heads, N * group, head_dim].
        rows, shape = len(queries), (-1, backend.num_kv_heads, backend.head_dim)
        folded = queries.reshape(shape).transpose(0, 1)[None]
        if self._alone:
            (_, _, where, mask), *_ = self._parts
            out = backend.attend(folded, *backend.pool.read(layer, where), mask).transpose(1, 2)
        else:
            out = queries.new_zeros(rows * backend.group, *shape[1:])
            for target, source, where, mask in self._parts:
                attended = backend.attend(folded[:, :, source], *backend.pool.read(layer, where), mask)
                out[target] = attended[0].transpose(0, 1)[: target.stop - target.start]
        return out.reshape(rows, -1)


@lru_cache(4)
def _ancestor_mask(
    num_ridden: int, width: int, beyond: int, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[riders * group, ridden rows + riders + beyond]; nobody sees the last columns."""
    behind = torch.arange(num_ridden, device=device).repeat_interleave(width)  # which row each rides behind
    rows = torch.arange(num_ridden, device=device) <= behind[:, None]
    own = (behind == behind[:, None]).tril()
    seen = F.pad(torch.cat((rows, own), 1), (0, beyond))
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return mask.repeat_interleave(group, dim=0)
