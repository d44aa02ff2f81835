"""Rotary position embeddings, scaled as the checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.shape import ModelConfig


def rope_tables(
    config: ModelConfig, rope: Mapping[str, Any], max_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of a rotary embedding (arXiv 2104.09864), [max_len, 1, head_dim].

    In the half-split layout element i is rotated with i + head_dim / 2; the sign of the
    rotation is folded into sin, so that rotating is x * cos + roll(x) * sin. The elements that
    a partial embedding leaves alone stand last in both halves, and are turned by nothing.
    """
    inverse, scale = _inverse_frequencies(config, rope, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse)
    idle = config.head_dim // 2 - len(inverse)
    cos, sin = F.pad(angles.cos() * scale, (0, idle), value=1.0), F.pad(angles.sin() * scale, (0, idle))
    return torch.cat((cos, cos), -1)[:, None].to(device, dtype), torch.cat((-sin, sin), -1)[:, None].to(device, dtype)


def _inverse_frequencies(config: ModelConfig, rope: Mapping[str, Any], max_len: int) -> tuple[Tensor, float]:
    """[rotary_dim / 2] float32 and the factor that scales cos and sin.

    Scalings that depend on the length of a text are fixed by `max_len`, so that no key that is
    cached is ever out of date: longrope takes its long factors if a text may exceed the original
    length. "dynamic" scales beyond max_position_embeddings only, so here it does nothing.
    """
    kind = rope.get("rope_type", "default")
    if kind in ("default", "dynamic"):
        theta, dim = float(rope.get("rope_theta", 10000.0)), config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / theta**exponents, 1.0
    # Scaled kinds take their formulas from transformers, which is slow to import.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference = LlamaConfig(
        hidden_size=config.num_attention_heads * config.head_dim,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(rope),
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](reference, torch.device("cpu"), seq_len=max_len)
    return inverse.float(), float(scale)
