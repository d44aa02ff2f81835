"""What a training is told, once: the command line only fills it in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skippy.engine.adapter import DEFAULT_WIDTH, AdapterConfig, part_shapes, part_sizes
from skippy.engine.errors import ConfigError
from skippy.engine.shape import ModelConfig
from skippy.engine.weights import Checkpoint

LARGEST_SHARE, SMALLEST_SHARE = 0.1, 0.01
SMALL_BASE = 10_000_000
"""Parameters of a base whose adapter may have LARGEST_SHARE of its bytes; it falls with the square root."""
SCALES = 32
LARGEST_DRAFT_VOCABULARY = 32768
AT_ONCE = 64
"""Sequences of the training text that the model writes at the same time."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How an adapter is trained. None lets the base decide (see `adapter_config`).

    Attributes:
        data: JSONL file of prompts, read with `read_prompts`; every one opens at most one sequence.
        exclude: JSONL file of evaluation texts that no training text may overlap with.
        sequences, length: the training text, in sequences of `length` tokens.
        batch_size, anchors: sequences per step, and places in each of them that are drafted from.
        tv_share: the share of total variation in the loss, once the first quarter is over; the rest is KL.
        gradient_checkpointing: compute the draft rows twice instead of keeping all of them for the
            backward pass; None does so where the memory would not suffice. What is learnt is the same.
        skip_start, skip_end, num_speculative_tokens, lora_rank, head_size, bridge_rank, recurrent,
            fused: see `AdapterConfig`.

    Raises:
        ConfigError: a value is out of range.
    """

    data: str | None = None
    exclude: str | None = None
    steps: int = 2000
    sequences: int = 2048
    length: int = 320
    batch_size: int = 8
    anchors: int = 48
    learning_rate: float = 8e-3
    tv_share: float = 0.7
    seed: int = 0
    gradient_checkpointing: bool | None = None
    num_speculative_tokens: int = DEFAULT_WIDTH
    skip_start: int | None = None
    skip_end: int | None = None
    lora_rank: int | None = None
    head_size: int | None = None
    bridge_rank: int | None = None
    recurrent: bool = True
    fused: bool = False
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("sequences", 1), ("length", 16), ("batch_size", 1), ("anchors", 1)):
            if not least <= getattr(self, name) < 2**24:
                raise ConfigError(f"{name} must be at least {least} and below 16777216, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0.0 <= self.tv_share <= 1.0:
            raise ConfigError(f"tv_share must be between 0 and 1, got {self.tv_share}.")
        if self.anchors > self.length - self.num_speculative_tokens:
            raise ConfigError(
                f"length {self.length} has no room for {self.anchors} anchors and {self.num_speculative_tokens} tokens "
                "behind the last of them: raise length or lower anchors."
            )

    def adapter_config(self, base: ModelConfig, weight_bytes: int) -> AdapterConfig:
        """The shape of the adapter to train, with everything left open decided.

        Args:
            weight_bytes: of the base's weight files.

        Raises:
            ConfigError: an adapter of this shape does not fit the base.
        """
        start, end = (0, 0) if self.fused else default_band(base.num_hidden_layers)
        start = start if self.skip_start is None else self.skip_start
        end = end if self.skip_end is None else self.skip_end

        def shaped(scale: int) -> AdapterConfig:
            lora_rank, head_size, bridge_rank = default_sizes(base.hidden_size, scale)
            bridge_rank = 0 if self.fused else bridge_rank
            return AdapterConfig(
                skip_start=start,
                skip_end=end,
                num_speculative_tokens=self.num_speculative_tokens,
                lora_rank=lora_rank if self.lora_rank is None else self.lora_rank,
                head_size=head_size if self.head_size is None else self.head_size,
                bridge_rank=bridge_rank if self.bridge_rank is None else self.bridge_rank,
                recurrent=self.recurrent,
                fused=self.fused,
                draft_vocab_size=default_draft_vocab(base.vocab_size)
                if self.draft_vocab_size is None
                else self.draft_vocab_size,
            )

        try:
            shaped(1).check(base)
        except ValueError as error:
            raise ConfigError(f"no such adapter fits the model: {error}.") from error
        budget = adapter_budget(base, weight_bytes)
        for scale in range(SCALES, 1, -1):
            if sum(part_sizes(shaped(scale), base).values()) <= budget:
                return shaped(scale)
        return shaped(1)


def default_band(layers: int) -> tuple[int, int]:
    """The layers to skip, [start, end): half of them, behind the first fifth, where it was measured to pay most."""
    start = round(layers * 0.2)
    return start, start + layers // 2


def default_draft_vocab(vocab_size: int) -> int:
    """How many tokens are worth drafting: the most frequent ones of a large vocabulary, or 0, for all, of a small one.

    What is frequent differs from text to text, and the product that a small vocabulary saves is small.
    """
    return LARGEST_DRAFT_VOCABULARY if vocab_size >= 2 * LARGEST_DRAFT_VOCABULARY else 0


def default_sizes(hidden_size: int, scale: int) -> tuple[int, int, int]:
    """LoRA rank, head size and bridge rank, of proportions that worked; scale is in 1/SCALES."""
    share = scale / SCALES
    head = 8 * round(1.5 * hidden_size * share / 8)
    return max(1, round(hidden_size * share / 16)), max(8, head), max(1, round(hidden_size * share / 4))


def adapter_budget(base: ModelConfig, weight_bytes: int) -> int:
    """The most numbers that an adapter should hold, stored as float16.

    A tenth of the base's bytes for a small one, a hundredth from a billion parameters on.
    """
    parameters = num_parameters(base)
    share = max(SMALLEST_SHARE, LARGEST_SHARE * min(1.0, SMALL_BASE / parameters) ** 0.5)
    return int(weight_bytes * share / 2)


def num_parameters(base: ModelConfig) -> int:
    """Of a base, but for its norms and biases."""
    matrices = sum(rows * columns for rows, columns in part_shapes(base).values())
    embeddings = base.vocab_size * base.hidden_size * (1 if base.tie_word_embeddings else 2)
    return base.num_hidden_layers * matrices + embeddings


def fresh_shape(checkpoint: Checkpoint) -> AdapterConfig:
    """Of an adapter that is to learn while it serves: as trained by default, but over the whole vocabulary.

    Which tokens are frequent is not known yet.
    """
    options = TrainOptions(draft_vocab_size=0)
    return options.adapter_config(checkpoint.config, num_parameters(checkpoint.config) * checkpoint.dtype.itemsize)
