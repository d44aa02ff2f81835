"""The paged pool: what is written to a slot is read back through a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skippy.engine.kv import KVPool

LAYERS, BLOCKS, SIZE, HEADS, DIM = 2, 6, 4, 3, 8
CPU = torch.device("cpu")


@pytest.fixture
def pool() -> KVPool:
    return KVPool(LAYERS, BLOCKS, SIZE, HEADS, DIM, torch.float32, CPU)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def slots(pool: KVPool, table: list[int], count: int) -> Tensor:
    return torch.tensor([pool.slot(table, position) for position in range(count)])


@pytest.mark.parametrize("table", [[1, 2, 3], [3, 1, 2], [5, 0, 2], [0, 2, 4]])
def test_rows_are_read_back_in_order_of_position(pool: KVPool, table: list[int]) -> None:
    keys, values = rows(10, seed=1), rows(10, seed=2)
    past = pool.past(table)
    pool.write(1, slots(pool, table, 10), torch.cat((keys, values), 1))
    read_keys, read_values = past[1]
    assert read_keys.shape == read_values.shape == (1, HEADS, 3 * SIZE, DIM)
    assert torch.equal(read_keys[0, :, :10].transpose(0, 1), keys)
    assert torch.equal(read_values[0, :, :10].transpose(0, 1), values)


def test_a_write_touches_its_layer_and_its_slots_only(pool: KVPool) -> None:
    pool.write(1, slots(pool, [2], 3), torch.cat((rows(3), rows(3)), 1))
    assert not pool.keys[0].any()
    written = pool.keys[1].any(-1).any(-1)
    assert written.nonzero().flatten().tolist() == [8, 9, 10]


def test_a_slot_is_a_block_and_an_offset(pool: KVPool) -> None:
    assert [pool.slot([4, 1], position) for position in (0, 3, 4, 7)] == [16, 19, 4, 7]


@pytest.mark.parametrize("table", [[0], [2, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_neighbouring_blocks_are_read_without_a_copy(pool: KVPool, table: list[int]) -> None:
    keys, values = pool.past(table)[0]
    assert keys.data_ptr() == pool.keys[0, table[0] * SIZE].data_ptr()
    assert values.data_ptr() == pool.values[0, table[0] * SIZE].data_ptr()


@pytest.mark.parametrize("table", [[1, 0], [0, 2, 1, 3], [0, 0], [3, 5]])
def test_scattered_blocks_are_gathered(pool: KVPool, table: list[int]) -> None:
    past = pool.past(table)
    everything = torch.arange(BLOCKS * SIZE)
    pool.write(1, everything, torch.cat((rows(len(everything), seed=1), rows(len(everything), seed=2)), 1))
    places = [block * SIZE + offset for block in table for offset in range(SIZE)]
    for found, cached in zip(past[1], (pool.keys[1], pool.values[1]), strict=True):
        assert torch.equal(found[0].transpose(0, 1), cached[places])


def test_the_pool_starts_at_zero(pool: KVPool) -> None:
    assert not pool.keys.any()
    assert not pool.values.any()


def test_padding_rows_have_a_block_that_no_table_can_hold(pool: KVPool) -> None:
    assert pool.padding_slot == BLOCKS * SIZE
    pool.write(0, torch.full((3,), pool.padding_slot), torch.cat((rows(3), rows(3)), 1))
    keys, _ = pool.past(list(range(BLOCKS)))[0]
    assert not keys.any()


def test_zero_erases_the_blocks_at_every_layer(pool: KVPool) -> None:
    for layer in range(LAYERS):
        everything = torch.arange(BLOCKS * SIZE)
        values = torch.full((len(everything), HEADS, DIM), float("nan"))
        pool.write(layer, everything, torch.cat((rows(len(everything)), values), 1))
    pool.zero([4, 1])
    kept = [0, 2, 3, 5]
    for layer in range(LAYERS):
        for block in (4, 1):
            keys, values = pool.past([block])[layer]
            assert not keys.any()
            assert not values.any()
        keys, values = pool.past(kept)[layer]
        assert keys.all()
        assert values.isnan().all()


def test_num_bytes_counts_keys_and_values(pool: KVPool) -> None:
    assert pool.num_bytes == 2 * LAYERS * (BLOCKS + 1) * SIZE * HEADS * DIM * 4
