"""The shape of a decoder, and which of its layers a pass runs through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's terms where it has any. The defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    """rope_type, rope_theta and what the type needs; see `rope.rope_tables`."""
    local_rope_parameters: Mapping[str, Any] | None = None
    """Of the layers with a window, where theirs differ."""
    nope_layers: frozenset[int] = frozenset()
    """Without a rotary embedding."""
    sliding_window: int | None = None
    """How many tokens a row of `sliding_layers` sees, its own included."""
    sliding_layers: frozenset[int] = frozenset()
    attention_bias: bool = False
    """Of queries, keys and values."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    """A name in `model.ACTIVATIONS`."""
    norm_names: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    """What the norms before and behind attention, before and behind the MLP are called, if there are any."""
    norm_offset: float = 0.0
    """What a checkpoint leaves out of the weights of its norms."""
    qk_norm: str | None = None
    """Queries and keys are normalised: each "head" by itself, or "all" at once."""
    query_scale: float | None = None
    """Of the attention's scores; None for 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Of what attention and MLP add."""
    logit_scale: float = 1.0

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are turned."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a row sees, by layer; None for all."""
        layers = range(self.num_hidden_layers)
        return tuple(self.sliding_window if layer in self.sliding_layers else None for layer in layers)


Plan = tuple[int, ...]
"""The layers that a pass runs through."""


def full_plan(config: ModelConfig) -> Plan:
    """Every layer: what the verifier runs."""
    return tuple(range(config.num_hidden_layers))


def skipping_plan(config: ModelConfig, start: int, end: int) -> Plan:
    """The layers outside the skip band [start, end) (arXiv 2405.20314, section 3)."""
    return tuple(layer for layer in full_plan(config) if not start <= layer < end)
