"""Matrices in 8 and 4 bits, quantised when the model is loaded, by bitsandbytes.

Embeddings, norms and the head stay as they are; the matrices of the layers become

    int8  a row of the weight, and a row of the input when it comes, are integers from -127 to
          127 times one number each, the row's largest magnitude / 127: LLM.int8()
          (arXiv 2208.07339) with threshold 0, that is, without outliers kept apart.
          8 bits per weight and 32 per row.
    nf4   64 weights in a row share their largest magnitude, and each is one of 16 quantiles of a
          normal distribution times it: NormalFloat (arXiv 2305.14314). 4.5 bits per weight.
          The paper's double quantisation would save 0.37 bits of them, and cost a second
          lookup for every block; like bitsandbytes itself, this leaves it out.

A row of a product must not depend on the others that share the pass. Sums of integers are
exact in whatever order, so int8 gives that by itself. nf4 unpacks the matrix and multiplies
as without quantisation, for one row as for many, in tiles of rows that agree (see `linear`).
The weights are never trained, but an adapter on top of them is: a product has a gradient by its
input, that of the weights that it stands for.

On a GPU bitsandbytes' kernels multiply, and rows are as equal as those allow: with int8 a
difference of rounding in the input may grow to a step of its integers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.config import NF4_BLOCK, Quantization
from skippy.engine.linear import Kernel, Pack, Product, plain

PIECE = 2**20
"""Weights that are quantised at a time, a multiple of NF4_BLOCK: what that needs besides is several times as large."""


def pack_as(quantization: Quantization) -> Pack | None:
    """What packs the matrices of the layers; None where they stay as they are."""
    return None if quantization == "none" else partial(quantise, kind=quantization)


def quantise(weight: Tensor, bias: Tensor | None, kind: Quantization) -> tuple[Product, Kernel]:
    """Pack a weight [out_features, in_features] and a bias [out_features] as "int8" or "nf4".

    Nothing of the weight is kept. Returns the product and the kernel whose order of summation
    it has.

    Raises:
        ValueError: the kind is another.
    """
    match kind:
        case "int8":
            return Int8Product.of(weight, bias), Int8Product.of
        case "nf4":
            return NF4Product.of(weight, bias), plain
    raise ValueError(f"there is no quantisation {kind!r}")


class _Quantised(Protocol):
    def compute(self, x: Tensor) -> Tensor: ...

    def dequantised(self, dtype: torch.dtype) -> Tensor: ...


class _ByInput(torch.autograd.Function):
    """A quantised product in training: nothing unpacked is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: _Quantised) -> Tensor:
        ctx.product = product
        return product.compute(x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0] @ ctx.product.dequantised(outputs[0].dtype), None


def _product(x: Tensor, quantised: _Quantised) -> Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return quantised.compute(x)
    y: Tensor = _ByInput.apply(x, quantised)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, slots=True)
class Int8Product:
    """x W^T + b with W, and x row by row, in 8 bits."""

    weight: Tensor  # [out_features, in_features] int8
    scale: Tensor  # [out_features] float32, the largest magnitude of every row
    bias: Tensor | None  # [out_features]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Quantise a weight [out_features, in_features]."""
        packed = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        rows = max(1, PIECE // weight.shape[1])
        for piece, into, scale_into in zip(*(torch.split(t, rows) for t in (weight, packed, scale)), strict=True):
            quantised, largest, _ = _operators().int8_vectorwise_quant(piece.half() if piece.is_cuda else piece)
            into.copy_(quantised)
            scale_into.copy_(largest)
        return cls(packed, scale, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] to [R, out_features]."""
        return _product(x, self)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight that is multiplied by, [out_features, in_features]."""
        return self.weight.to(dtype) * (self.scale / 127).to(dtype)[:, None]

    def compute(self, x: Tensor) -> Tensor:
        # Of bitsandbytes no more than the product of integers on a GPU: the rest goes through float16, which some
        # models' activations exceed; and a processor without AVX-512 it has sum in float32, which rounds.
        largest = x.abs().amax(-1, keepdim=True).float().clamp_min_(1e-30)
        rows = (x * (127 / largest)).round_().to(torch.int8)
        if x.is_cuda:
            sums: Tensor = _operators().int8_linear_matmul(rows, self.weight)
        else:
            sums = torch._int_mm(rows, self.weight.t())
        y = sums.float().mul_(largest / 127**2).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class NF4Product:
    """x W^T + b with W in 4 bits."""

    weight: Tensor  # [blocks * NF4_BLOCK / 2, 1] uint8, two weights in each, row by row, padded to whole blocks
    scale: Tensor  # [blocks] float32, the largest magnitude of every block
    bias: Tensor | None  # [out_features]
    shape: tuple[int, int]  # out_features, in_features

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Quantise a weight [out_features, in_features]."""
        flat = weight.reshape(-1)
        blocks = -(-len(flat) // NF4_BLOCK)
        packed = torch.empty(blocks * NF4_BLOCK // 2, 1, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(blocks, dtype=torch.float32, device=weight.device)
        pieces = (torch.split(flat, PIECE), torch.split(packed, PIECE // 2), torch.split(scale, PIECE // NF4_BLOCK))
        for piece, into, scale_into in zip(*pieces, strict=True):
            whole = F.pad(piece, (0, -len(piece) % NF4_BLOCK))
            quantised, largest = _operators().quantize_4bit(whole, NF4_BLOCK, "nf4", torch.uint8)
            into.copy_(quantised)
            scale_into.copy_(largest)
        out_features, in_features = weight.shape
        return cls(packed, scale, bias, (out_features, in_features))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight that is multiplied by, [out_features, in_features]."""
        out_features, in_features = self.shape
        # As a matrix of blocks: with blocks that go over the end of a row the CPU kernel errs.
        blocks: Tensor = _operators().dequantize_4bit(
            self.weight, self.scale, NF4_BLOCK, "nf4", (len(self.scale), NF4_BLOCK), dtype
        )
        return blocks.view(-1)[: out_features * in_features].view(self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] to [R, out_features]."""
        return _product(x, self)

    def compute(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.shape[1] % NF4_BLOCK == 0:
            y: Tensor = _operators().gemm_4bit(x, self.weight, self.shape, self.scale, NF4_BLOCK, "nf4", self.bias)
            return y
        return F.linear(x, self.dequantised(x.dtype), self.bias)


@cache
def _operators() -> Any:
    """bitsandbytes' operators, registered by importing it, which takes seconds."""
    # It warns that a kernel is not installed, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes
