"""What a training takes, from shapes alone: the time of a step and the most memory.

    python -m skippy.engine.training.estimate [--memory-gb 24] [--tflops 50] [--bandwidth-gbs 600]

One formula for every size. A step's time is that of its products and that of everything
between them, which on any processor waits for memory:

    seconds = sum over products max(FLOPs / FLOP/s, weight bytes / bandwidth)
              + bytes moved between products / bandwidth

and its memory is what stays (weights, adapter, its gradient and moments, what the teacher pass
leaves behind) plus the larger of what the forward and backward passes hold at their peaks.
Evaluations are left out. Counted are the operations of `passes`, `loss` and `model` as they stand;
`tests/benchmarks/training_cost.py` holds the result against what is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb, prod
from typing import NamedTuple

from skippy.engine.adapter import AdapterConfig, part_shapes, part_sizes
from skippy.engine.config import NF4_BLOCK, Quantization
from skippy.engine.shape import ModelConfig
from skippy.engine.training.loss import rows_of_vocabulary
from skippy.engine.training.options import AT_ONCE, TrainOptions, num_parameters

FLOAT = 4
"""Bytes of a float32: of the adapter, its gradient and moments, and of probabilities."""
ADAPTER_COPIES = 4
"""Weights, gradient and AdamW's two moments."""
OPTIMIZER_PASSES = 20
"""Over the adapter's numbers, to clip the gradient and to apply it."""
TOPK_BYTES = 64
"""Per probability, to select the largest: on a CPU copies with their indices, gone over a few times."""


@dataclass(frozen=True, slots=True)
class Processor:
    """What a processor reaches: for large products about 0.7 of the peak that its datasheet gives.

    Attributes:
        flops: FLOP/s of products in the type of the weights.
        bandwidth: bytes/s from and to its memory.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Work:
    """Attributes:
    flops: of one product or several.
    weight_bytes: read by them.
    moved_bytes: read and written by all that is no product.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    moved_bytes: float = 0.0

    def seconds(self, processor: Processor) -> float:
        return (
            max(self.flops / processor.flops, self.weight_bytes / processor.bandwidth)
            + self.moved_bytes / processor.bandwidth
        )


@dataclass(frozen=True, slots=True)
class Precision:
    """How a base is held.

    Attributes:
        itemsize: bytes of a number of its activations, embeddings and head.
        bytes_per_weight: of its layers' products; less than `itemsize` if they are quantised.
    """

    itemsize: int = 2
    bytes_per_weight: float = 2.0

    @property
    def is_quantised(self) -> bool:
        return self.bytes_per_weight < self.itemsize


BFLOAT16, FLOAT32 = Precision(), Precision(4, 4.0)
BYTES_PER_WEIGHT: Mapping[Quantization, float] = {"int8": 1.0, "nf4": 0.5 + FLOAT / NF4_BLOCK}
"""See `quant`."""
INT8, NF4 = Precision(2, BYTES_PER_WEIGHT["int8"]), Precision(2, BYTES_PER_WEIGHT["nf4"])


@dataclass(frozen=True, slots=True)
class Estimate:
    """Attributes:
    step: the work of one training step, by phase.
    text: the work of writing the training text, all of it.
    memory: the most bytes held at a time, by what they are for.
    gradient_checkpointing: whether that is with it.
    """

    step: dict[str, Work]
    text: Work
    memory: dict[str, float]
    gradient_checkpointing: bool

    def step_seconds(self, processor: Processor) -> float:
        return sum(work.seconds(processor) for work in self.step.values())

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())


def estimate(base: ModelConfig, adapter: AdapterConfig, options: TrainOptions, precision: Precision) -> Estimate:
    """The cost of training `adapter`; `options.gradient_checkpointing` of None counts as False."""
    shape = _Shape(base, adapter, options, precision)
    return Estimate(dict(_step(shape)), _text(shape), dict(_memory(shape)), bool(options.gradient_checkpointing))


class _Shape:
    """The numbers that the formula is made of. "Row" is a row of the pass in question."""

    def __init__(self, base: ModelConfig, adapter: AdapterConfig, options: TrainOptions, precision: Precision) -> None:
        self.options, self.precision = options, precision
        self.width, self.length = adapter.num_speculative_tokens, options.length
        self.teacher_rows = options.batch_size * options.length
        self.draft_rows = options.batch_size * options.anchors * self.width
        self.judged_rows = options.batch_size * _expected_places(options.length, options.anchors, self.width)
        self.layers = base.num_hidden_layers
        self.kept = self.layers - (adapter.skip_end - adapter.skip_start)
        self.hidden, self.inner, self.vocab = base.hidden_size, base.intermediate_size, base.vocab_size
        self.heads = base.num_attention_heads
        self.past = options.length + adapter.num_speculative_tokens
        """Keys that a draft row's attention computes with, and about as many as a teacher's."""
        self.scores = self.heads * self.past
        self.queries, self.keys_values = self.heads * base.head_dim, 2 * base.num_key_value_heads * base.head_dim
        self.layer_weights = sum(prod(shape) for shape in part_shapes(base).values())
        self.embeddings = base.vocab_size * base.hidden_size * (1 if base.tie_word_embeddings else 2)
        self.head_weights = base.vocab_size * base.hidden_size
        self.bridged, self.head_size = adapter.bridge_rank > 0, adapter.head_size
        sizes = part_sizes(adapter, base)
        self.lora, self.ends, self.adapter = sizes["lora"], sizes["bridge"] + sizes["head"], sum(sizes.values())

    def products(self, rows: float, layers: int) -> Work:
        """The base's matrices of some layers, applied to rows (or to gradients of them)."""
        weights = layers * self.layer_weights
        # A quantised matrix is written out in the type of the activations, and read again.
        unpacked = 2 * self.precision.itemsize * weights if self.precision.is_quantised else 0
        return Work(2 * rows * weights, self.precision.bytes_per_weight * weights, unpacked)

    def head(self, rows: float) -> Work:
        chunks = max(1.0, rows / rows_of_vocabulary(self.vocab))
        return Work(2 * rows * self.head_weights, chunks * self.precision.itemsize * self.head_weights)

    def between(self, rows: float, layers: int, counts: _Moved) -> Work:
        """What lies between the products of some layers."""
        numbers = (
            counts.hidden * self.hidden
            + counts.qkv * (self.queries + self.keys_values)
            + counts.queries * self.queries
            + counts.inner * self.inner
            + counts.scores * self.scores
        )
        norms = NORMS * counts.norm * self.hidden * FLOAT  # float32, whatever the type of the model
        return Work(moved_bytes=rows * layers * (numbers * self.precision.itemsize + norms))


def _expected_places(length: int, anchors: int, width: int) -> float:
    """Distinct places of a sequence that the rows behind random anchors ask the teacher about, on average."""
    free = length - width  # places for an anchor, of which `near` are too near before a place to miss it
    nears = (min(place, width, free, length - place) for place in range(1, length))
    return sum(1 - comb(free - near, anchors) / comb(free, anchors) for near in nears)


# --- time --------------------------------------------------------------------------------------------------------


class _Moved(NamedTuple):
    """Numbers read or written between the products of a layer, per row and per number of each kind of vector."""

    norm: int
    hidden: int
    qkv: int
    queries: int
    inner: int
    scores: int


NORMS = 2
"""Per layer."""
# Counted operation by operation in `DecoderLayer`, `RMSNorm`, `BoundAdapter` and `passes`: a sum of two is 3, a softmax
# 4 (its input is read for the largest, the sum and the result), and LoRA's thin products are what they read.
TEACHER = _Moved(norm=5, hidden=6, qkv=10, queries=6, inner=9, scores=2)
DRAFT = _Moved(norm=5, hidden=12, qkv=14, queries=16, inner=14, scores=14)
BACKWARD = _Moved(norm=14, hidden=29, qkv=22, queries=25, inner=26, scores=19)


def _step(s: _Shape) -> Iterator[tuple[str, Work]]:
    size, vocab = s.precision.itemsize, s.vocab
    yield "teacher, products", s.products(s.teacher_rows, s.layers)
    yield "teacher, attention", Work(4 * s.teacher_rows * s.queries * s.length * s.layers)
    yield "teacher, between", s.between(s.teacher_rows, s.layers, TEACHER)
    yield "teacher, head", s.head(s.judged_rows)
    yield "teacher, likeliest tokens", Work(moved_bytes=s.judged_rows * vocab * (4 * size + FLOAT + TOPK_BYTES))

    lora, attention = Work(2 * s.draft_rows * s.lora), Work(4 * s.draft_rows * s.queries * s.past * s.kept)
    for turn in ("draft", "draft again") if s.options.gradient_checkpointing else ("draft",):
        yield f"{turn}, products", s.products(s.draft_rows, s.kept)
        yield f"{turn}, LoRA", lora
        yield f"{turn}, attention", attention
        yield f"{turn}, between", s.between(s.draft_rows, s.kept, DRAFT)
    # Weights of the base get no gradient, nor do the teacher's keys and values: a product each, as forward.
    yield "backward, products", s.products(s.draft_rows, s.kept)
    yield "backward, LoRA", Work(2 * lora.flops)
    yield "backward, attention", attention
    yield "backward, between", s.between(s.draft_rows, s.kept, BACKWARD)
    yield "bridge and sequential head", Work(3 * 2 * s.draft_rows * s.ends)
    yield "draft, head", s.head(s.draft_rows)
    yield "backward, head", s.head(s.draft_rows)
    yield "loss", Work(moved_bytes=s.draft_rows * vocab * (7 * size + 4 * FLOAT))
    yield "optimizer", Work(moved_bytes=OPTIMIZER_PASSES * FLOAT * s.adapter)


def _text(s: _Shape) -> Work:
    """AT_ONCE sequences at a time, a token of each per pass: without drafts, so it may be less."""
    tokens = s.options.sequences * s.options.length
    passes = max(1.0, tokens / AT_ONCE)
    layers, head = s.products(tokens, s.layers), s.precision.itemsize * s.head_weights
    return Work(
        layers.flops + 2 * tokens * s.head_weights,
        passes * (layers.weight_bytes + head),
        # On average half of a sequence is cached and read.
        tokens * s.length / 2 * s.keys_values * s.layers * s.precision.itemsize,
    )


# --- memory ------------------------------------------------------------------------------------------------------


def _memory(s: _Shape) -> Iterator[tuple[str, float]]:
    size = s.precision.itemsize
    yield "weights", s.layers * s.layer_weights * s.precision.bytes_per_weight + s.embeddings * size
    yield "adapter and optimizer", ADAPTER_COPIES * FLOAT * s.adapter
    teaching = s.teacher_rows * (s.kept * s.keys_values + 3 * s.hidden) * size
    yield "teacher's keys, values and features", teaching
    layer = s.draft_rows * (4 * s.hidden + 4 * s.queries + s.scores + 4 * s.inner) * size
    # What enters the first layer and leaves the last; bridge; sequential head; each with its gradient or norm.
    ends = s.draft_rows * (4 * s.hidden + 4 * s.hidden * s.bridged + 3 * s.hidden * (s.head_size > 0) + 4 * s.head_size)
    yield "ends of the draft rows", ends * size
    logits = min(max(s.draft_rows, s.judged_rows), rows_of_vocabulary(s.vocab)) * s.vocab
    # The logits, the probabilities, and a copy of either in the other's type.
    loss = logits * (size + FLOAT + (FLOAT if size < FLOAT else 0))
    teacher = s.teacher_rows * (4 * s.inner + 4 * s.hidden) * size - ends * size
    if s.options.gradient_checkpointing:
        yield "what enters the draft's layers", s.kept * s.draft_rows * s.hidden * size
        attending = 4 * s.draft_rows * s.scores * size
        yield "one layer, or logits", max(layer, attending, loss, teacher)
    else:
        yield "the draft's layers", s.kept * layer
        yield "logits", max(loss, teacher - s.kept * layer)


# --- the command -------------------------------------------------------------------------------------------------

LLAMAS = {
    # As published: Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B.
    "1B": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, tie_word_embeddings=True),
    "3B": ModelConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, tie_word_embeddings=True),
    "8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, tie_word_embeddings=False),
}
PRECISIONS = {"bfloat16": BFLOAT16, "int8": INT8, "nf4": NF4}
RESERVE = 1e9
"""Bytes of a GPU that its driver and the allocator's gaps take."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Predict time and memory of `skippy train` for Llamas of three sizes.")
    parser.add_argument("--memory-gb", type=float, default=24.0, help="of the GPU (default: 24)")
    parser.add_argument("--tflops", type=float, default=50.0, help="that products reach, about 0.7 of the datasheet's")
    parser.add_argument("--bandwidth-gbs", type=float, default=600.0, help="of the memory (default: 600)")
    arguments = parser.parse_args()
    processor = Processor(arguments.tflops * 1e12, arguments.bandwidth_gbs * 1e9)
    available = arguments.memory_gb * 1e9 - RESERVE
    lines = [
        "| model | base | checkpointing | adapter | predicted GB | fits | predicted s per step | predicted hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _line(name, precision, checkpointing, processor, available)
        for name in LLAMAS
        for precision in PRECISIONS
        for checkpointing in (False, True)
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _line(name: str, precision: str, checkpointing: bool, processor: Processor, available: float) -> str:
    base, options = LLAMAS[name], TrainOptions(gradient_checkpointing=checkpointing)
    adapter = options.adapter_config(base, 2 * num_parameters(base))
    cost = estimate(base, adapter, options, PRECISIONS[precision])
    step = cost.step_seconds(processor)
    hours = (options.steps * step + cost.text.seconds(processor)) / 3600
    numbers = cost.memory["adapter and optimizer"] / (ADAPTER_COPIES * FLOAT) / 1e6
    return (
        f"| {name} | {precision} | {'yes' if checkpointing else 'no'} | {numbers:.1f}M | {cost.peak_bytes / 1e9:.1f} "
        f"| {'yes' if cost.peak_bytes <= available else 'no'} | {step:.2f} | {hours:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
