"""How many rows give every row the same bits, found out by probes that are not the test's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skippy.engine import sdpa
from skippy.engine.sdpa import SDPA, row_multiple


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize(("kv_heads", "group", "dim", "block"), [(2, 2, 16, 8), (2, 2, 64, 32), (4, 1, 64, 16)])
def test_bfloat16_does_not_hide_the_order_of_summation(
    *, kv_heads: int, group: int, dim: int, block: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """Scores that are all due to be 0, magnified: what comes out is how they were summed."""
    kernel = SDPA(kv_heads, group, dim, block, dim**-0.5, softcap, dtype)
    multiple = row_multiple(kernel, 4 * block, frozenset({None}))
    table = kernel.mask_table(4 * block, None)
    generator = torch.Generator().manual_seed(5)
    rows = block + multiple - 1
    part = torch.randn(1, kv_heads, rows * group, dim // 2, generator=generator).to(dtype) * 512
    queries = torch.cat((part, part.flip(-1)), -1)
    part = torch.randn(1, kv_heads, 2 * block, dim // 2, generator=generator).to(dtype) * 512
    keys = torch.cat((part, -part.flip(-1)), -1)
    values = torch.randn(1, kv_heads, 2 * block, dim, generator=generator).to(dtype)

    def attend(first: int, count: int) -> Tensor:
        part = slice(first * group, (first + count) * group)
        return kernel.attend(queries[:, :, part], keys, values, table[part, -2 * block :])

    whole = attend(0, block)
    for first in range(block):
        alone = attend(first, multiple)[:, :, :group]
        assert torch.equal(alone, whole[:, :, first * group : (first + 1) * group]), f"row {first}"


def test_a_kernel_that_treats_rows_differently_by_their_number_needs_a_multiple(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every run of rows that is no multiple of four comes out a little different."""
    attend = SDPA.attend

    def uneven(kernel: SDPA, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return attend(kernel, queries, keys, values, mask) + (queries.shape[2] // kernel.group % 4) * 2**-10

    monkeypatch.setattr(SDPA, "attend", uneven)
    kernel = SDPA(2, 2, 16, 8, 0.25, None, torch.float32)
    assert sdpa._row_multiple.__wrapped__(kernel, 32, frozenset({None, 11}), 1) == 4


@pytest.mark.parametrize(("window", "columns"), [(None, 32), (3, 16), (9, 16), (10, 24)])
def test_the_table_begins_with_the_block_of_the_first_slot_that_any_row_sees(window: int | None, columns: int) -> None:
    table = SDPA(1, 2, 16, 8, 1.0, None, torch.float32).mask_table(24, window)
    assert table.shape[1] == columns
    for row in range(8):
        position = columns - 8 + row
        seen = range(max(0, position + 1 - (window or columns)), position + 1)
        for line in table[2 * row : 2 * row + 2]:
            assert (line == 0).nonzero().flatten().tolist() == list(seen)
            assert set(line.tolist()) == {0.0, float("-inf")} or len(seen) == columns
