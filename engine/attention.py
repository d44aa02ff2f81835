"""Attention over the paged pool, on PyTorch's SDPA.

Exactness: the result of a row depends on its own position and nothing else. Rows are cut
where a KV block ends, so a row at position p always reads the same whole blocks, whoever
shares the pass: all up to its own, b = p // block_size, or in a layer with a window those
from the first that any row of block b sees. Slots that it does not see are masked. Row counts
are padded to a multiple that was measured to give every row the same bits (see `sdpa`). A
padding row is simply the next row of the pass, read along and thrown away.

The pool keeps the keys and values of all layers at full length: behind a window they are
skipped, not given back.

Riders (see `tensors.RiderSegment`) come behind all these rows and are read by none of them.
Their tokens are drafts, so their bits need not be the same in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.kv import KVPool, Past
from skippy.engine.sdpa import SDPA, row_multiple
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


class SDPAAttention:
    """`scaled_dot_product_attention`, segment by segment.

    Args:
        max_len: the longest sequence, in tokens.
        windows: by layer, how many tokens a row sees, its own included; None for all. Nothing: no windows.
        softcap: scores become softcap * tanh(score / softcap) (arXiv 2408.00118, section 2).

    Attributes:
        windows: the same for every layer, less the windows that no sequence outgrows.
    """

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        max_len: int,
        scale: float,
        windows: Sequence[int | None] = (),
        softcap: float | None = None,
    ) -> None:
        self.pool = pool
        num_kv_heads, head_dim = pool.keys.shape[2:]
        group = num_heads // num_kv_heads
        self.kernel = SDPA(num_kv_heads, group, head_dim, pool.block_size, scale, softcap, pool.keys.dtype)
        layers = windows or [None] * len(pool.keys)
        self.windows = [None if window is None or window >= max_len else window for window in layers]
        kinds, device = frozenset(self.windows), pool.keys.device
        longest = -(-max_len // pool.block_size) * pool.block_size
        self._masks = {window: self.kernel.mask_table(longest, window, device) for window in kinds}
        self.multiple = 1
        if device.type == "cpu":
            self.multiple = row_multiple(self.kernel, longest, kinds)

    def rows_read(self, segments: Sequence[Segment]) -> int:
        """How many rows a batch of these segments must have: all up to the last one's, and those that pad it."""
        last = segments[-1]
        return last.row + self._padded(last.num_rows)

    def begin(
        self,
        segments: list[Segment],
        slots: Tensor,
        riders: Sequence[RiderSegment] = (),
        first_draft: int | None = None,
    ) -> PassAttention:
        """Attention of a pass.

        Args:
            segments: one behind the other, from row 0 on.
            riders: behind them.
            first_draft: the rows from there on are a drafter's; what they cache stays finite.
        """
        return _SDPAPass(self, segments, slots, riders, first_draft)

    def first_block(self, position: int, window: int | None) -> int:
        """The first of the blocks that a row reads: the same for all rows of a block."""
        if window is None:
            return 0
        size = self.pool.block_size
        return max(0, position // size * size - window + 1) // size

    def mask(self, position: int, rows: int, window: int | None = None) -> Tensor:
        """Additive mask [rows * group, slots] of `rows` rows from `position` on.

        Slots begin with the block `first_block` and end with that of `position`. A view: the
        columns of the table end like them, row r stands for offset r within the block.
        """
        size, group, table = self.pool.block_size, self.kernel.group, self._masks[window]
        offset = position % size
        slots = (position // size + 1 - self.first_block(position, window)) * size
        return table[offset * group : (offset + rows) * group, table.shape[1] - slots :]

    def rider_mask(self, riders: RiderSegment, window: int | None = None) -> Tensor:
        """Additive mask [riders * group, slots]. What precedes the ridden rows is seen by all, within the window."""
        size, group, keys = self.pool.block_size, self.kernel.group, self.pool.keys
        near = _ancestor_mask(riders.num_ridden, riders.width, size, group, keys.dtype, keys.device)
        slots = len(riders.table) * size
        mask = F.pad(near[:, : slots - riders.position], (riders.position, 0))
        end = riders.position + riders.num_ridden
        if window is None or end + riders.width <= window:
            return mask
        rows = torch.arange(riders.num_ridden, device=keys.device)[:, None]
        own = (riders.position + 1 + rows + torch.arange(riders.width, device=keys.device)).flatten()
        positions = torch.cat((torch.arange(end, device=keys.device), own))
        hidden = positions <= own[:, None] - window
        hidden = F.pad(hidden, (0, slots - hidden.shape[1])).repeat_interleave(group, dim=0)
        return mask.masked_fill(hidden, float("-inf"))

    def part(self, segment: Segment, window: int | None) -> _Part:
        """What one segment is to the layers with this window."""
        rows = self._padded(segment.num_rows)
        past = self.pool.past(segment.table[self.first_block(segment.position, window) :])
        return self._part(segment.row, segment.num_rows, rows, past, self.mask(segment.position, rows, window))

    def rider_part(self, riders: RiderSegment, window: int | None) -> _Part:
        past, mask = self.pool.past(riders.table), self.rider_mask(riders, window)
        return self._part(riders.row, riders.num_rows, riders.num_rows, past, mask)

    def _part(self, row: int, wanted: int, padded: int, past: Past, mask: Tensor) -> _Part:
        group = self.kernel.group
        return _Part(row * group, wanted * group, padded * group, past, mask)

    def _padded(self, rows: int) -> int:
        return -(-rows // self.multiple) * self.multiple


class _Part(NamedTuple):
    """Rows that are attended for at once. Rows here are those of the product, heads of a group included."""

    first: int
    """They stand behind all that the parts before want."""
    wanted: int
    """How many rows are asked for."""
    padded: int
    """How many there are with the padding behind them."""
    past: Past
    """What they read."""
    mask: Tensor


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
        by_window = {
            window: [backend.part(segment, window) for segment in segments]
            + [backend.rider_part(segment, window) for segment in riders]
            for window in dict.fromkeys(backend.windows)
        }
        self._parts = [by_window[window] for window in backend.windows]
        self._first_draft = first_draft
        # The usual step of a single client: one segment, padded, is the whole batch.
        parts, rows = self._parts[0], len(slots) * backend.kernel.group
        self._alone = len(parts) == 1 and parts[0].padded == rows
        self._beyond = rows - sum(part.wanted for part in parts)

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        backend, kernel, parts = self._backend, self._backend.kernel, self._parts[layer]
        if self._first_draft is not None:
            # Others read these slots masked, which does not help against NaN; no adapter may break their rows.
            keys_values[self._first_draft :].nan_to_num_(0.0, 0.0, 0.0)
        backend.pool.write(layer, self._slots, keys_values)
        # Heads that share a KV head become rows of one product: [1, kv_heads, N * group, head_dim].
        rows, shape = len(queries), (-1, kernel.num_kv_heads, kernel.head_dim)
        folded = queries.reshape(shape).transpose(0, 1)[None]
        if self._alone:
            out = kernel.attend(folded, *parts[0].past[layer], parts[0].mask).transpose(1, 2)
        else:
            pieces = [
                kernel.attend(folded.narrow(2, part.first, part.padded), *part.past[layer], part.mask)
                .transpose(1, 2)
                .narrow(1, 0, part.wanted)
                for part in parts
            ]
            if self._beyond:
                pieces.append(queries.new_zeros(1, self._beyond, *shape[1:]))
            out = torch.cat(pieces, 1)
        return out.reshape(rows, -1)


@lru_cache(64)
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
