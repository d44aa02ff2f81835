"""The paged KV cache: one pool of blocks for the verifier and every drafter."""

from __future__ import annotations

import torch
from torch import Tensor


class KVPool:
    """Keys and values of all layers, addressed by slot = block * block_size + offset.

    A draft pass leaves its keys and values behind a sequence's last verified token, where
    the verify pass then puts its own; so there is no second cache for drafting. One block
    beyond the allocator's takes what padding rows write.

    Attributes:
        cache: [layers, slots, 2 * kv_heads, head_dim], a token's keys before its values, zero
            at first: masking multiplies a value by zero, and that does not help against NaN.
        keys, values: the halves of it, [layers, slots, kv_heads, head_dim] each.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.padding_slot = num_blocks * block_size
        shape = (num_layers, (num_blocks + 1) * block_size, 2 * num_kv_heads, head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self.cache.chunk(2, dim=2)
        # Views made once: a view costs microseconds, and a step would make hundreds.
        self._layers = list(self.cache)
        self._heads = [
            (keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def slot(self, table: list[int], position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return table[block] * self.block_size + offset

    def slots(self, table: list[int], start: int, stop: int) -> list[int]:
        """The slots of the positions from start to stop - 1."""
        size = self.block_size
        slots: list[int] = []
        for block in range(start // size, -(-stop // size)):
            first = self.slot(table, max(start, block * size))
            slots += range(first, first + min(stop, (block + 1) * size) - max(start, block * size))
        return slots

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """Store rows. slots [N] int64; keys_values [N, 2 * kv_heads, head_dim]."""
        self._layers[layer].index_copy_(0, slots, keys_values)

    def locate(self, table: list[int]) -> slice | Tensor:
        """Where the slots of these blocks are: a slice if they stand together, else indices."""
        first, count = table[0], len(table)
        if table[-1] - first == count - 1 and table == list(range(first, first + count)):
            return slice(first * self.block_size, (first + count) * self.block_size)
        blocks = torch.tensor(table, dtype=torch.int64, device=self.keys.device)
        offsets = torch.arange(self.block_size, device=self.keys.device)
        return (blocks[:, None] * self.block_size + offsets).flatten()

    def read(self, layer: int, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, slots, head_dim]; views for a slice."""
        if isinstance(where, slice):
            keys, values = self._heads[layer]
            return keys[:, :, where], values[:, :, where]
        gathered = self._layers[layer].index_select(0, where).transpose(0, 1)[None]
        keys, values = gathered.chunk(2, dim=1)
        return keys, values

    def zero(self, table: list[int]) -> None:
        """Erase blocks whose content is not to be trusted, so that no NaN outlives its request."""
        for block in table:
            slots = slice(block * self.block_size, (block + 1) * self.block_size)
            self.cache[:, slots] = 0

    @property
    def num_bytes(self) -> int:
        return self.cache.nbytes
