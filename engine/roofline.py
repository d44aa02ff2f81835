"""What a model costs and what a card gives, from sizes alone. Pure Python.

A pass of the model takes as long as the slower of reading its bytes and doing its arithmetic
(the roofline of Williams, Waterman and Patterson, CACM 52(4), 2009):

    seconds = max(bytes / bandwidth, operations / peak)

It is a bound: launches, uneven work and what else a step does come on top. With R rows of B
sequences of C tokens each, of the share s of the layers,

    bytes       s * layers + head + s * B * C * KV bytes of a token
    operations  2 R * (s * matrices + head) + 4 s R C * heads * head_dim * layers

A step that drafts g tokens with a share b of the layers and checks them emits, if every
drafted token is accepted with the same probability a once those before it were,

    1 + a + ... + a^g = (1 - a^(g + 1)) / (1 - a)

tokens (arXiv 2211.17192, section 3.1). Where rows cost nothing a draft costs `beta_eff` of a
plain pass, b weighted with the bytes that it reads, so that the speed-up is those tokens
over 1 + beta_eff: the closed form, which `tune` prints beside what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skippy.engine.config import NF4_BLOCK, Quantization

GB = 10**9
"""As datasheets count. What a driver reports is up to 6 % more, or a few per cent less with ECC."""


@dataclass(frozen=True, slots=True)
class Card:
    """The datasheet of a processor, dense figures.

    Attributes:
        memory_bytes: all of it.
        bandwidth: of its memory, bytes per second.
        half, int8, single: multiply-adds of matrices, counted as two operations, per second: in bfloat16 (or
            float16) with float32 sums, in int8, and in float32.
        source: where the figures are from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    half: float
    int8: float
    single: float
    source: str
    has_bfloat16: bool = True


CARDS: Mapping[str, Card] = {
    "a10g": Card("NVIDIA A10G", 24 * GB, 600e9, 70e12, 140e12, 35e12, "NVIDIA A10G datasheet"),
    "t4": Card("NVIDIA T4", 16 * GB, 320e9, 65e12, 130e12, 8.1e12, "NVIDIA T4 product brief", has_bfloat16=False),
    "l4": Card("NVIDIA L4", 24 * GB, 300e9, 121e12, 242e12, 30.3e12, "NVIDIA L4 datasheet"),
    "3090": Card("GeForce RTX 3090", 24 * GB, 936e9, 71e12, 284e12, 35.6e12, "NVIDIA GA102 whitepaper"),
    "4090": Card("GeForce RTX 4090", 24 * GB, 1008e9, 165.2e12, 660.6e12, 82.6e12, "NVIDIA Ada whitepaper"),
    "h100": Card("NVIDIA H100 SXM", 80 * GB, 3350e9, 989e12, 1979e12, 67e12, "NVIDIA H100 datasheet"),
    # Arithmetic, not a product: 8 * 3.5e9 Hz * 2 units * 8 lanes * 2 operations, and 2 * 3200e6 * 8 bytes. Without
    # AMX or VNNI narrower types are no faster.
    "cpu": Card("8 cores at 3.5 GHz with AVX2", 32 * GB, 51.2e9, 0.9e12, 0.9e12, 0.9e12, "JEDEC DDR4-3200, 2 channels"),
}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """How many numbers a model holds where.

    Attributes:
        embedding, head: vocab_size * hidden_size each; with `tied` embeddings they are the same numbers.
        layers: how many there are, all alike.
        matrices: (out, in) features of each matrix of one layer.
        vectors: norms and biases of the whole model.
        kv_width: keys and values of a token in one layer.
        query_width: heads * head_dim.
        head_dim: elements of the rotary tables per position, which are two.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    matrices: tuple[tuple[int, int], ...]
    vectors: int
    kv_width: int
    query_width: int
    head_dim: int
    tied: bool

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def layer(self) -> int:
        """Numbers in the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.vectors + self.head * (1 if self.tied else 2)


# --- bytes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a loaded model. `tables` are those of the rotary embedding; `vectors` norms and biases."""

    embedding: int
    head: int
    layers: int
    vectors: int
    tables: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.layers + self.vectors + self.tables

    @property
    def read(self) -> int:
        """What a plain pass reads: of the embedding and the tables only the rows it needs."""
        return self.layers + self.vectors + self.head


def loaded_weights(
    sizes: ModelSizes, itemsize: int, stored_itemsize: int, quantization: Quantization, max_len: int, *, on_cpu: bool
) -> Weights:
    """What a model takes once it is loaded in a type of `itemsize` bytes, but for quantised matrices.

    On a GPU tied embeddings are there once. On a CPU matrices are packed apart, the head beside the embedding, even a
    tied one, and as float16 where that loses nothing.

    Args:
        stored_itemsize: bytes of a number in the checkpoint.
    """
    embedding = sizes.head * itemsize
    packed = 2 if 2 in (stored_itemsize, itemsize) else 4
    return Weights(
        embedding=0 if sizes.tied and not on_cpu else embedding,
        head=sizes.head * packed if on_cpu else embedding,  # widened to float32 before it is packed
        layers=sizes.layers * matrices_bytes(sizes, min(itemsize, packed) if on_cpu else itemsize, quantization),
        vectors=sizes.vectors * itemsize,
        tables=2 * max_len * sizes.head_dim * itemsize,
    )


def matrices_bytes(sizes: ModelSizes, itemsize: int, quantization: Quantization) -> int:
    """Bytes of the matrices of one layer.

    int8 keeps a byte per number and a float32 scale per row (LLM.int8(), arXiv 2208.07339); nf4 half a byte per
    number and a float32 scale per NF4_BLOCK of them (QLoRA, arXiv 2305.14314; its scales are not quantised again).
    """
    match quantization:
        case "none":
            return sizes.layer * itemsize
        case "int8":
            return sum(rows * columns + 4 * rows for rows, columns in sizes.matrices)
        case "nf4":
            blocks = [-(-rows * columns // NF4_BLOCK) for rows, columns in sizes.matrices]
            return sum(count * (NF4_BLOCK // 2 + 4) for count in blocks)


def kv_bytes_per_token(sizes: ModelSizes, itemsize: int) -> int:
    return sizes.layers * sizes.kv_width * itemsize


# --- time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """What passes of one model read and compute on one card.

    Attributes:
        layer_bytes, head_bytes: read by a plain pass, norms with the layers.
        kv_bytes: of one token.
        layer_peak, head_peak: operations per second in the layers' products and in the head's.
    """

    sizes: ModelSizes
    layer_bytes: int
    head_bytes: int
    kv_bytes: int
    bandwidth: float
    layer_peak: float
    head_peak: float

    @classmethod
    def of(cls, card: Card, sizes: ModelSizes, weights: Weights, itemsize: int, quantization: Quantization) -> Cost:
        """int8 weights are multiplied in int8, as bitsandbytes does; nf4 ones are widened first."""
        peak = card.half if itemsize == 2 else card.single
        return cls(
            sizes,
            weights.layers + weights.vectors,
            weights.head,
            kv_bytes_per_token(sizes, itemsize),
            card.bandwidth,
            card.int8 if quantization == "int8" else peak,
            peak,
        )

    def pass_seconds(self, batch: int, rows: int, context: int, layers: float = 1.0, head: float = 1.0) -> float:
        """One pass of `rows` rows over `batch` sequences of `context` tokens each.

        Args:
            layers, head: the share of the layers, and of the head's rows, that takes part.
        """
        sizes = self.sizes
        read = layers * (self.layer_bytes + batch * context * self.kv_bytes) + head * self.head_bytes
        products = 2 * rows * layers * sizes.layers * sizes.layer
        attention = 4 * rows * context * layers * sizes.layers * sizes.query_width
        logits = 2 * rows * head * sizes.head
        computing = products / self.layer_peak + (attention + logits) / self.head_peak
        return max(read / self.bandwidth, computing)

    def step_seconds(self, batch: int, width: int, context: int, layers: float, head: float) -> float:
        """A draft pass of `width` rows per sequence, if any, and the verify pass of one more."""
        draft = self.pass_seconds(batch, batch * width, context, layers, head) if width else 0.0
        return draft + self.pass_seconds(batch, batch * (width + 1), context)

    @property
    def free_rows(self) -> int:
        """Rows of a pass that cost no time beside reading the weights."""
        sizes = self.sizes
        row = 2 * sizes.layers * sizes.layer / self.layer_peak + 2 * sizes.head / self.head_peak
        return max(1, math.floor((self.layer_bytes + self.head_bytes) / self.bandwidth / row))


def beta_eff(weights: Weights, layers: float, head: float) -> float:
    """The bytes that a draft pass reads, of these shares of the layers and of the head's rows, over a plain pass'."""
    return (layers * (weights.layers + weights.vectors) + head * weights.head) / weights.read


def tokens_per_step(acceptance: float, width: int) -> float:
    """Emitted by a step that drafts `width` tokens, each accepted with the same probability after those before it."""
    return math.fsum(acceptance**depth for depth in range(width + 1))


def closed_form(acceptance: float, width: int, beta_eff: float) -> float:
    """The speed-up over plain decoding where rows cost nothing; 1 without a draft."""
    return tokens_per_step(acceptance, width) / (1.0 + beta_eff) if width else 1.0
