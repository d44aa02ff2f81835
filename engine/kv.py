"""The paged KV cache: one pool of blocks for the verifier and every drafter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Past(Protocol):
    """What some rows read of their sequence in the pool, layer by layer."""

    def __getitem__(self, layer: int, /) -> tuple[Tensor, Tensor]:
        """Keys and values, [1, kv_heads, slots, head_dim] each."""
        ...


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
        # Views made once: each costs microseconds.
        self._layers = list(self.cache)
        self._by_head = [half.transpose(1, 2)[:, None] for half in (self.keys, self.values)]

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

    def past(self, table: list[int]) -> Past:
        """Keys and values of the slots of these blocks; a layer's are to be asked for after what is written to it."""
        first, count = table[0], len(table)
        if table[-1] - first == count - 1 and table == list(range(first, first + count)):
            start, length = first * self.block_size, count * self.block_size
            keys, values = (half.narrow(3, start, length).unbind() for half in self._by_head)
            return list(zip(keys, values, strict=True))
        blocks = torch.tensor(table, dtype=torch.int64, device=self.keys.device)
        offsets = torch.arange(self.block_size, device=self.keys.device)
        return _Gathered(self._layers, (blocks[:, None] * self.block_size + offsets).flatten())

    def zero(self, table: list[int]) -> None:
        """Erase blocks whose content is not to be trusted, so that no NaN outlives its request."""
        for block in table:
            slots = slice(block * self.block_size, (block + 1) * self.block_size)
            self.cache[:, slots] = 0

    @property
    def num_bytes(self) -> int:
        return self.cache.nbytes


class _Gathered:
    """Of blocks that do not stand together: copied for every layer.

    Args:
        layers: [slots of the pool, 2 * kv_heads, head_dim] each.
        slots: [slots] int64.
    """

    def __init__(self, layers: list[Tensor], slots: Tensor) -> None:
        self._layers = layers
        self._slots = slots

    def __getitem__(self, layer: int, /) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer].index_select(0, self._slots).transpose(0, 1)[None].chunk(2, dim=1)
        return keys, values
