"""Tilings: how many rows a product may have without one row noticing another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skippy.engine import linear
from skippy.engine.linear import MULTIPLES, ROW_COUNTS, RowLinear, Tiling, common_tiling, measure_tiling

PROBE = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))

Compute = Callable[[Tensor], Tensor]


def kernels(kernel_of: Callable[[int], float]) -> Compute:
    """A product whose result shows which kernel its number of rows was given to."""
    return lambda x: x + kernel_of(len(x))


def with_tail(width: int) -> Compute:
    """A product of `width` rows at a time, and of the rest in another way."""

    def compute(x: Tensor) -> Tensor:
        y = x.clone()
        y[len(x) // width * width :] += 1
        return y

    return compute


class TestMeasure:
    def test_where_all_agree_nothing_is_padded_and_little_cut(self) -> None:
        assert measure_tiling(kernels(lambda _: 0), PROBE) == Tiling(1, 256)

    def test_odd_counts_differ(self) -> None:
        assert measure_tiling(kernels(lambda rows: rows % 2), PROBE) == Tiling(2, 256)

    def test_one_row_differs(self) -> None:
        assert measure_tiling(kernels(lambda rows: rows == 1), PROBE) == Tiling(2, 256)

    def test_few_rows_differ(self) -> None:
        assert measure_tiling(kernels(lambda rows: rows < 16), PROBE) == Tiling(16, 256)

    def test_many_rows_differ(self) -> None:
        assert measure_tiling(kernels(lambda rows: rows > 32), PROBE) == Tiling(1, 32)

    def test_few_and_many_rows_differ(self) -> None:
        assert measure_tiling(kernels(lambda rows: (rows < 4) + 2 * (rows > 128)), PROBE) == Tiling(4, 128)

    @pytest.mark.parametrize("width", [2, 4, 8, 16])
    def test_the_tail_of_a_tile_differs(self, width: int) -> None:
        assert measure_tiling(with_tail(width), PROBE) == Tiling(width, 256)

    def test_nothing_agrees(self) -> None:
        tiling = measure_tiling(kernels(float), PROBE)
        assert tiling.multiple == tiling.largest, "one row count is left, and it agrees with itself"

    def test_a_difference_in_one_bit_counts(self) -> None:
        def compute(x: Tensor) -> Tensor:
            return torch.nextafter(x, torch.full_like(x, torch.inf)) if len(x) > 32 else x

        assert measure_tiling(compute, PROBE) == Tiling(1, 32)

    def test_no_more_rows_than_were_probed(self) -> None:
        assert measure_tiling(kernels(lambda _: 0), PROBE[:64]) == Tiling(1, 64)

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(
        kernel_of=st.dictionaries(st.sampled_from(ROW_COUNTS), st.integers(1, 2), max_size=8),
        probed=st.sampled_from([32, 64, 256]),
    )
    def test_every_row_count_that_it_allows_agrees(self, kernel_of: dict[int, int], probed: int) -> None:
        tiling = measure_tiling(kernels(lambda rows: kernel_of.get(rows, 0)), PROBE[:probed])
        allowed = {rows for rows in ROW_COUNTS if rows % tiling.multiple == 0 and rows <= tiling.largest}
        assert len({kernel_of.get(rows, 0) for rows in allowed | {tiling.multiple}}) == 1
        assert tiling.multiple in MULTIPLES
        assert tiling.multiple <= tiling.largest <= probed


class TestTiling:
    @pytest.mark.parametrize(("rows", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32)])
    def test_padding_is_up_to_a_multiple(self, rows: int, padded: int) -> None:
        assert Tiling(16, 64).padded(rows) == padded

    def test_the_common_tiling_suits_all(self) -> None:
        assert common_tiling([Tiling(1, 256), Tiling(8, 256), Tiling(2, 100)]) == Tiling(8, 96)
        assert common_tiling([Tiling(32, 32), Tiling(1, 24)]) == Tiling(32, 32)


def random_linear(
    outputs: int, inputs: int, dtype: torch.dtype, bias: bool = False
) -> tuple[RowLinear, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).bfloat16().to(dtype)
    offset = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return RowLinear(weight.clone(), offset), weight, offset


def random_rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def cancelling(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[RowLinear, Tensor]:
    """A product whose results are all due to be 0, and 128 rows for it.

    What comes out is the rounding error of the summation, so that even bfloat16 shows in
    which order it was done.
    """
    generator = torch.Generator().manual_seed(2)
    weight = torch.zeros(outputs, inputs, dtype=dtype)
    rows = torch.zeros(128, inputs, dtype=dtype)
    half = inputs // 2
    for tensor, sign in ((weight, -1), (rows, 1)):
        part = torch.randn(len(tensor), half, generator=generator).bfloat16().to(dtype)
        tensor[:, :half], tensor[:, half : 2 * half] = part, sign * part.flip(1)
    return RowLinear(weight), rows


@pytest.fixture(params=["_half", "_blocked", "plain"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel in turn; what it does not take goes to the plain one."""
    monkeypatch.setattr(linear, "CPU_KERNELS", (getattr(linear, request.param), linear.plain))


SHAPES = [(64, 64), (256, 704), (1408, 256), (97, 33)]


@pytest.mark.usefixtures("layout")
class TestRowLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_a_row_is_the_same_to_the_bit_in_every_company(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        product, x = cancelling(outputs, inputs, dtype)
        padded = product.tiling.padded
        together = product(x)
        assert together.any(), "there is rounding error to compare"
        for rows in range(1, 81):
            assert torch.equal(product(x[: padded(rows)])[:rows], together[:rows]), f"{rows} rows"
        for start in range(1, 81):
            assert torch.equal(product(x[start : start + padded(1)])[0], together[start]), f"from {start} on"

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
    )
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_it_is_the_product(
        self, outputs: int, inputs: int, bias: bool, dtype: torch.dtype, tolerance: float
    ) -> None:
        product, weight, offset = random_linear(outputs, inputs, dtype, bias)
        x = random_rows(product.tiling.padded(50), inputs, dtype)
        expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        assert product(x).dtype == dtype
        torch.testing.assert_close(product(x).double(), expected, rtol=tolerance, atol=tolerance)

    def test_more_rows_than_a_tile_are_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product, _, _ = random_linear(64, 64, torch.float32)
        product.tiling = Tiling(4, 8)
        tiles: list[int] = []

        def record(x: Tensor) -> Tensor:
            tiles.append(len(x))
            return x + 1

        monkeypatch.setattr(product, "_product", record)
        x = random_rows(20, 64, torch.float32)
        assert torch.equal(product(x), x + 1)
        assert tiles == [8, 8, 4]

    def test_it_knows_its_shape(self) -> None:
        product, weight, _ = random_linear(64, 48, torch.float32)
        assert (product.out_features, product.in_features) == tuple(weight.shape)


class TestHalf:
    """float16 weights under float32 arithmetic, only where nothing is lost."""

    def test_a_bfloat16_checkpoint_is_taken(self) -> None:
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        assert linear._half(weight, None) is not None

    @pytest.mark.parametrize("value", [1 / 3, 1e5, float("inf")], ids=["too fine", "too large", "infinite"])
    def test_a_weight_that_float16_cannot_hold_is_not(self, value: float) -> None:
        weight = torch.zeros(32, 64)
        weight[3, 5] = value
        assert linear._half(weight, None) is None
