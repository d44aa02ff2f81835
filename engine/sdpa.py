"""PyTorch's attention, and how many rows at once give every row the same bits.

The kernel behind `scaled_dot_product_attention` is free to sum in another order for another
number of rows. From which multiple on it does not is measured, once in a process for each
kind of attention (see `linear`, which does so for matrix products).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.linear import MULTIPLES

PROBED_BLOCKS = (*range(1, 9), 12, 16, 24, 33, 64)
"""Every length a few blocks long, then some: kernels change with the length, too."""
LONGEST_PROBE = 2 * max(PROBED_BLOCKS)
"""No probe has as many blocks."""


@dataclass(frozen=True, slots=True)
class SDPA:
    """What decides how rows are attended for, but for their number.

    Attributes:
        group: query heads that share a KV head, and are rows of one product.
        block_size: tokens of a KV block; rows are cut where one ends.
        softcap: scores become softcap * tanh(score / softcap) (arXiv 2408.00118, section 2).
    """

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    scale: float
    softcap: float | None
    dtype: torch.dtype

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [1, kv_heads, rows * group, head_dim]; keys, values [1, kv_heads, slots, head_dim]."""
        if self.softcap is not None:
            return capped_attention(queries, keys, values, mask, self.scale, self.softcap)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)

    def mask_table(self, longest: int, window: int | None, device: torch.device | None = None) -> Tensor:
        """What the rows of a block may see: additive, [(block_size + max(MULTIPLES)) * group, slots].

        The columns end with the block's slots. Before them are as many as the longest sequence has, in tokens, or
        whole blocks of those that the window of the block's first row reaches back to.
        """
        size = self.block_size
        # Padding rows may reach past the block's last row; they see what that sees.
        row = torch.arange(size + max(MULTIPLES), device=device).clamp(max=size - 1)[:, None]
        before = longest if window is None else -(-(window - 1) // size) * size
        column = torch.arange(-before, size, device=device)
        hidden = column > row
        if window is not None:
            hidden |= column <= row - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf")).repeat_interleave(self.group, dim=0)


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """`scaled_dot_product_attention` with softcapped scores (arXiv 2408.00118, section 2), which it does not offer.

    queries [..., rows, head_dim]; keys, values [..., slots, head_dim]; mask [rows, slots], added. Softmax in float32.
    """
    scores = torch.tanh((queries @ keys.transpose(-1, -2)).float() * (scale / softcap)) * softcap + mask
    return scores.softmax(-1).to(values.dtype) @ values


def row_multiple(kernel: SDPA, longest: int, windows: frozenset[int | None]) -> int:
    """The smallest multiple of rows for which every row comes out the same, to the bit, on a CPU.

    Args:
        longest: tokens of the longest sequence, in whole blocks.
        windows: of the layers; None is one without.
    """
    # Longer sequences than any probe are all one to the cache.
    return _row_multiple(kernel, min(longest, LONGEST_PROBE * kernel.block_size), windows, torch.get_num_threads())


@cache
def _row_multiple(kernel: SDPA, longest: int, windows: frozenset[int | None], threads: int) -> int:
    del threads  # they may decide how the rows are shared out
    tables = [kernel.mask_table(longest, window) for window in windows]
    probes = [
        (table, *probe)
        for blocks in PROBED_BLOCKS
        if blocks * kernel.block_size <= longest
        for probe in _probes(kernel, blocks, longest)
        for table in tables
        if probe[1].shape[2] <= table.shape[1]
    ]
    for multiple in MULTIPLES:
        if all(_rows_agree(kernel, multiple, *probe) for probe in probes):
            return multiple
    return max(MULTIPLES)


def _probes(kernel: SDPA, blocks: int, longest: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values in which the order of summation shows, even in bfloat16.

    Rounding to bfloat16 hides most of it, so one probe of so many blocks has scores that
    cancel, rounding errors magnified, and the other, of nearly twice as many if that is no
    more than the longest, equal scores and values that cancel before the last block.
    """
    size, length = kernel.block_size, blocks * kernel.block_size
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(1, kernel.num_kv_heads, rows, kernel.head_dim, generator=generator).to(kernel.dtype)

    queries, keys, values = random((size + max(MULTIPLES)) * kernel.group), random(length), random(length)
    half = kernel.head_dim // 2
    yield (
        torch.cat((queries[..., :half], queries[..., :half].flip(-1)), -1) * 1024,
        torch.cat((keys[..., :half], -keys[..., :half].flip(-1)), -1) * 1024,
        values,
    )
    if 2 * length - size <= longest:
        balanced = torch.cat((values[:, :, :-size], -values[:, :, :-size].flip(2), values[:, :, -size:] * 2**-16), 2)
        yield torch.zeros_like(queries), torch.cat((keys[:, :, :-size], keys), 2), balanced


def _rows_agree(kernel: SDPA, multiple: int, table: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether runs of `multiple` rows from anywhere, and of its multiples, agree with a whole block."""
    size, group = kernel.block_size, kernel.group

    def attend(start: int, count: int) -> Tensor:
        part = slice(start * group, (start + count) * group)
        out = kernel.attend(queries[:, :, part], keys, values, table[part, -keys.shape[2] :])
        return out[:, :, : (size - start) * group]

    whole = attend(0, size)
    runs = [(start, multiple) for start in range(size)] + [(0, n) for n in range(multiple, size + 1, multiple)]
    return all(
        torch.equal(attend(start, count), whole[:, :, start * group : (start + count) * group]) for start, count in runs
    )
