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
    """y = x W^T + b for inference, tile by tile, with W packed for the processor at hand.

    On a GPU the rows are not cut: cuBLAS picks kernels by shape, and no fixed small tile
    would use the machine. There the promise is the margin rule, not equality of bits.

    Args:
        weight: [out_features, in_features].
        bias: [out_features] or None.
        pack: lays the weight out; by default as it is, for the fastest kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: Pack | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._product, kernel = (pack or _fastest)(weight, bias)
        if weight.device.type == "cpu":
            shape, threads = (self.out_features, self.in_features), torch.get_num_threads()
            self.tiling = _shape_tiling(kernel, shape, weight.dtype, bias is not None, threads)
        else:
            self.tiling = Tiling(16, 2**31)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features], R a multiple of `tiling.multiple`, to [R, out_features]."""
        if len(x) <= self.tiling.largest:
            return self._product(x)
        return torch.cat([self._product(tile) for tile in torch.split(x, self.tiling.largest)])


Product = Callable[[Tensor], Tensor]
"""[R, in_features] to [R, out_features]."""
Kernel = Callable[[Tensor, Tensor | None], Product | None]
"""Packs a weight and a bias; None if the kernel does not suit the weight or the processor."""
Pack = Callable[[Tensor, Tensor | None], tuple[Product, Kernel]]
"""Packs a weight and a bias, and names the kernel whose order of summation the product has."""


@cache
def _shape_tiling(kernel: Kernel, shape: tuple[int, int], dtype: torch.dtype, biased: bool, threads: int) -> Tiling:
    """The tiling of every product like this; which code is run depends on no more than that.

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
        # Rounded so that every kernel takes it, the one of float16 weights too.
        part = torch.randn(count, half, generator=generator).bfloat16().float()
        odd = torch.zeros(count, in_features % 2)
        return torch.cat((part, sign * part[:, order], odd), -1).to(dtype)

    weight, probe = random(min(out_features, 256), -1), random(rows, 1)
    weight = weight.repeat(-(-out_features // len(weight)), 1)[:out_features].contiguous()
    product = kernel(weight, torch.zeros(out_features, dtype=dtype) if biased else None)
    assert product is not None
    return measure_tiling(product, probe)


def _fastest(weight: Tensor, bias: Tensor | None) -> tuple[Product, Kernel]:
    for kernel in CPU_KERNELS if weight.device.type == "cpu" else (plain,):
        product = kernel(weight, bias)
        if product is not None:
            break
    assert product is not None, "the plain kernel takes everything"
    return product, kernel


def plain(weight: Tensor, bias: Tensor | None) -> Product:
    """F.linear with the weight as it is."""
    return lambda x: F.linear(x, weight, bias)


def _half(weight: Tensor, bias: Tensor | None) -> Product | None:
    """float32 arithmetic over weights packed as float16 (FBGEMM), or None where that loses anything.

    A bfloat16 or float16 checkpoint loses nothing to speak of: bfloat16 has fewer digits than
    float16, and of values below its normal range at most 2^-25 is cut off, less than a float32
    sum rounds away. Half the bytes are read, and the kernel costs a third of oneDNN's overhead.
    """
    if weight.dtype != torch.float32 or "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    # In parts, because what is computed of a whole head would take more memory than the head.
    if any(_differs_in_half(part) for part in torch.split(weight, 1024)):
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    # The operator itself: what wraps it looks for traced objects, which shows in a small product's time.
    product = torch.ops.quantized.linear_dynamic_fp16.default._op

    def compute(x: Tensor) -> Tensor:
        y: Tensor = product(x, packed)
        return y

    return compute


def _differs_in_half(weight: Tensor) -> bool:
    too_large = (weight.abs() > torch.finfo(torch.float16).max).any()
    return bool(too_large or (weight - weight.half().float()).abs().max() > 2**-25)


def _blocked(weight: Tensor, bias: Tensor | None) -> Product | None:
    """oneDNN with the weight in its blocked layout, or None where PyTorch has no such kernel.

    1.5 to 4 times as fast at a few rows as F.linear, which reorders the weight for every call.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    product = torch.ops.mkldnn._linear_pointwise.default._op

    def compute(x: Tensor) -> Tensor:
        y: Tensor = product(x, packed, bias, "none", [], "")
        return y

    return compute


CPU_KERNELS: tuple[Kernel, ...] = (_half, _blocked, plain)
"""The fastest first."""
