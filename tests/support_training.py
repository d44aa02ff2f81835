"""A training small enough for a test."""

from __future__ import annotations

from pathlib import Path

from support_engine import write_checkpoint

from skippy.engine import EngineConfig
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


def training_config(folder: Path) -> EngineConfig:
    """For a model of four layers, which is written into the folder."""
    model = write_checkpoint(folder, num_hidden_layers=4)
    return EngineConfig(model=str(model), device="cpu", dtype="float32", num_threads=1, max_num_seqs=8)
