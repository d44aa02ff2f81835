"""The configuration of one engine, fixed for its life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skippy.engine.errors import ConfigError

BUILTIN_MODEL = "builtin"

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
MAX_SPECULATIVE_TOKENS = 32
"""The most that one step may draft for one sequence."""
NF4_BLOCK = 64
"""Weights that share a scale in nf4."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes are in tokens or bytes as named; None lets the engine choose.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = BUILTIN_MODEL
    revision: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    drafter: str = "auto"
    adapter: str | None = None
    num_speculative_tokens: int | None = None
    share_drafts: bool = True
    """Whether a request may be drafted from what others made the model say; its speed tells of that a little."""
    tuned_plan: str | None = None
    learn: str | None = None
    """Folder of an adapter that learns from what is served."""
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, limit in (
            ("max_num_seqs", 2**20),
            ("max_num_batched_tokens", 2**20),
            ("num_threads", 1024),
            ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS),
        ):
            if (getattr(self, name) or 0) > limit:
                raise ConfigError(f"{name} must be at most {limit}, got {getattr(self, name)}.")
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 0:
            raise ConfigError(f"num_speculative_tokens must be at least 0, got {self.num_speculative_tokens}.")
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs a row per step."
            )
        if self.learn is not None:
            self._check_learning()
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}.")

    def _check_learning(self) -> None:
        if self.drafter not in ("auto", "s3d", "hybrid"):
            raise ConfigError(f"learn trains an adapter, which the drafter {self.drafter} does not use.")
        if self.tuned_plan is not None:
            raise ConfigError("learn changes what tuned_plan is about: leave one of them out.")
        if not self.share_drafts:
            raise ConfigError("what is learnt from one request drafts for others: learn needs share_drafts.")
