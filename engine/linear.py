"""Matrix products whose rows do not depend on each other.

The output must not depend on what shares a pass, but a matrix product library is free to
pick another kernel, and so another order of summation, for another number of rows. Which
numbers of rows agree bit for bit differs by processor, dtype and shape, so it is measured
when the model is loaded: `measure_tiling` finds a multiple that rows are padded to and a
largest tile that they are cut into, within which every row comes out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 80, 96, 128, 192, 256)
MULTIPLES = (1, 2, 4, 8, 16, 32)


class Tiling(NamedTuple):
    """Row counts that agree bit for bit: multiples of `multiple` up to `largest`."""

    multiple: int
    largest: int

    def padded(self, rows: int) -> int:
        return -(-rows // self.multiple) * self.multiple


def common_tiling(tilings: Sequence[Tiling]) -> Tiling:
    """The tiling that suits all of them (multiples are powers of two)."""
    multiple = max(t.multiple for t in tilings)
    return Tiling(multiple, max(multiple, min(t.largest for t in tilings) // multiple * multiple))


def measure_tiling(compute: Callable[[Tensor], Tensor], probe: Tensor) -> Tiling:
    """Find the cheapest row counts for which `compute` treats rows alike, to the bit.

    `compute` maps [R, K] to [R, N] row by row; `probe` [256 or fewer, K] is random, so that
    a different order of summation shows. Row counts above the largest probed are never used.
    """
    counts = [r for r in ROW_COUNTS if r <= len(probe)]
    outputs = {r: compute(probe[:r]) for r in {*counts, *(m for m in MULTIPLES if m <= len(probe))}}
    best = Tiling(16, 16)
    for multiple in (m for m in MULTIPLES if 2 * m <= len(probe)):
        whole = torch.cat(
            [compute(probe[i : i + multiple]) for i in range(0, len(probe) // multiple * multiple, multiple)]
        )
        largest = 0
        for rows in (r for r in counts if r % multiple == 0):
            if not torch.equal(outputs[rows], whole[:rows]):
                break
            largest = rows
        # Small tiles make prompts slow, so a coarser multiple must allow much larger ones.
        if largest >= 64:
            return Tiling(multiple, largest)
        if largest > best.largest:
            best = Tiling(multiple, largest)
    return best


class RowLinear:
    """y = x W^T + b for inference, tile by tile; W is packed where oneDNN offers that.

    On a GPU the rows are not cut: cuBLAS picks kernels by shape, and no fixed small tile
    would use the machine. There the promise is the margin rule, not equality of bits.

    Args:
        weight: [out_features, in_features].
        bias: [out_features] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias
        self._packed = _pack(weight)
        self.tiling = self._measure() if weight.device.type == "cpu" else Tiling(16, 2**31)
        if self._packed is not None:
            self._weight = weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features], R a multiple of `tiling.multiple`, to [R, out_features]."""
        if len(x) <= self.tiling.largest:
            return self._product(x)
        return torch.cat([self._product(tile) for tile in torch.split(x, self.tiling.largest)])

    def _product(self, x: Tensor) -> Tensor:
        return _multiply(x, self._weight, self._packed, self._bias)

    def _measure(self) -> Tiling:
        shape, dtype, packed = (self.out_features, self.in_features), self._weight.dtype, self._packed is not None
        return _shape_tiling(shape, dtype, packed, self._bias is not None, torch.get_num_threads())


@cache
def _shape_tiling(shape: tuple[int, int], dtype: torch.dtype, packed: bool, biased: bool, threads: int) -> Tiling:
    """The tiling of every product like this; which kernel is picked depends on no more than that.

    Rounding to bfloat16 would hide most differences in the order of summation. So what is
    measured cancels: every output is due to be 0, and comes out as rounding error alone.
    """
    del threads
    out_features, in_features = shape
    # About 50 ms at most, however large the weight.
    rows = max(32, min(256, 2**32 // max(1, 2 * in_features * out_features)))
    generator = torch.Generator().manual_seed(0)
    half = in_features // 2
    order = torch.randperm(half, generator=generator)

    def random(count: int, sign: int) -> Tensor:
        part = torch.randn(count, half, generator=generator)
        odd = torch.zeros(count, in_features % 2)
        return torch.cat((part, sign * part[:, order], odd), -1).to(dtype)

    weight, probe = random(min(out_features, 256), -1), random(rows, 1)
    weight = weight.repeat(-(-out_features // len(weight)), 1)[:out_features].contiguous()
    blocked = _pack(weight) if packed else None
    bias = torch.zeros(out_features, dtype=dtype) if biased else None
    return measure_tiling(lambda x: _multiply(x, weight, blocked, bias), probe)


def _multiply(x: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    if packed is not None:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's blocked layout, or None where PyTorch has no such kernel.

    Packed products are 1.5 to 4 times as fast at a few rows, because F.linear reorders the
    weight anew for every call.
    """
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return packed
