"""A training small enough for a test."""

from __future__ import annotations

from skippy.engine.training.options import TrainOptions

OPTIONS = TrainOptions(
    steps=12,
    sequences=32,
    length=40,
    batch_size=4,
    anchors=6,
    num_speculative_tokens=3,
    lora_rank=2,
    head_size=16,
    bridge_rank=4,
)
