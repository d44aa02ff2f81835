"""The two passes of a training step, over whole sequences at once.

The teacher pass is the plain model over [B, T] tokens. The draft pass puts rows at many
places ("anchors") of every sequence: the token there and mask tokens behind it, or masks
alone if they are to ride in verify passes. They see the teacher's keys and values of what
precedes the anchor, and one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.model import CausalLM, softcapped
from skippy.engine.sdpa import capped_attention
from skippy.engine.shape import ModelConfig, full_plan, skipping_plan
from skippy.engine.tensors import TokenBatch


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the teacher pass leaves behind."""

    tokens: Tensor  # [B, T] int64
    keys_values: dict[int, tuple[Tensor, Tensor]]  # of the kept layers, each [B, kv_heads, T, head_dim]
    context: Tensor  # [B, T, 2, hidden_size], see S3DAdapter.bind
    hidden: Tensor  # [B, T, hidden_size], last and not normalised


@torch.no_grad()
def teach(model: CausalLM, adapter: S3DAdapter, tokens: Tensor) -> Teaching:
    """Run the plain model. tokens [B, T] int64."""
    shape = batch, length = tokens.shape
    attend = _CausalAttention(model.config, batch, length, set(adapter.kept))
    start, end = adapter.config.skip_start, adapter.config.skip_end
    positions = torch.arange(length, device=tokens.device).repeat(batch)
    hidden, taps = model(_token_batch(tokens, positions), full_plan(model.config), attend, taps={start, end})
    context = torch.stack((taps[end] - taps[start], hidden), 1)
    return Teaching(tokens, attend.cached, context.view(*shape, 2, -1), hidden.view(*shape, -1))


def draft_rows(
    model: CausalLM, adapter: S3DAdapter, teaching: Teaching, anchors: Tensor, *, checkpointing: bool = False
) -> Tensor:
    """The last hidden states of the draft rows at anchors [B, A] int64, [B, A, G, hidden_size].

    An anchor is the place of a newest token; the place before it must exist.

    Args:
        checkpointing: see `CausalLM.forward`.
    """
    width = adapter.config.num_speculative_tokens
    batch, count = anchors.shape
    masks = torch.tensor(adapter.mask_ids(adapter.config.num_masks), dtype=torch.int64, device=anchors.device)
    tokens = masks.expand(batch, count, -1)
    if not adapter.config.fused:
        tokens = torch.cat((teaching.tokens.gather(1, anchors)[:, :, None], tokens), -1)
    positions = anchors[:, :, None] + torch.arange(width, device=anchors.device)
    sequence = torch.arange(batch, device=anchors.device)[:, None]
    context = teaching.context[sequence, anchors - 1].repeat_interleave(width, 1).flatten(0, 1)
    attend = _AnchorAttention(model.config, teaching, anchors, width)
    plan = skipping_plan(model.config, adapter.config.skip_start, adapter.config.skip_end)
    rows = _token_batch(tokens, positions.flatten())
    hidden: Tensor = model(rows, plan, attend, adapter.bind(context), checkpointing=checkpointing)[0]
    return hidden.view(batch, count, width, -1)


def _token_batch(tokens: Tensor, positions: Tensor) -> TokenBatch:
    nothing = positions.new_empty(0)
    return TokenBatch(tokens.flatten(), positions, slots=nothing, segments=[], logit_rows=nothing)


class _CausalAttention:
    """Of the teacher: causal within each sequence. Keeps the keys and values of some layers."""

    def __init__(self, config: ModelConfig, batch: int, length: int, keep: set[int]) -> None:
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}
        self._scale, self._softcap = config.attention_scale, config.attention_softcap
        self._windows = config.windows
        self._shape = (batch, length)
        self._keep = keep

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        keys, values = keys_values.view(*self._shape, *keys_values.shape[1:]).transpose(1, 2).chunk(2, 1)
        if layer in self._keep:
            # Copies: what comes in is a view of the queries, too, and draft rows want them in this order.
            keys, values = self.cached[layer] = keys.contiguous(), values.contiguous()
        queries = queries.view(*self._shape, *queries.shape[1:]).transpose(1, 2)
        group = queries.shape[1] // keys.shape[1]  # query head h reads KV head h % kv_heads
        keys, values = keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1)
        out = self._attend(queries, keys, values, self._windows[layer])
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """All three [B, heads, T, head_dim]."""
        length = queries.shape[2]
        if self._softcap is None and (window is None or window >= length):
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=self._scale)
        hidden = torch.ones(length, length, dtype=torch.bool, device=queries.device)
        hidden = hidden.triu(1) if window is None else hidden.triu(1) | hidden.tril(-window)
        mask = torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device).masked_fill(hidden, float("-inf"))
        if self._softcap is None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scale)
        return capped_attention(queries, keys, values, mask, self._scale, self._softcap)


class _AnchorAttention:
    """Of draft rows: to what precedes their anchor, and causally to the rows of the same anchor.

    Written out, because a fused attention would take a mask over all pairs of anchors too,
    and be three times as slow.
    """

    def __init__(self, config: ModelConfig, teaching: Teaching, anchors: Tensor, width: int) -> None:
        self._teaching = teaching
        self._config = config
        self._shape = (*anchors.shape, width)
        self._hidden = {window: self._hide(anchors, window) for window in config.windows}

    def _hide(self, anchors: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """What the rows do not see of what precedes, [B, 1, A, 1, 1 or G, T], and of one another, [G, G]."""
        width, device = self._shape[-1], anchors.device
        past = torch.arange(self._teaching.tokens.shape[1], device=device)
        rows = torch.ones(width, width, dtype=torch.bool, device=device)
        anchors = anchors[:, None, :, None, None, None]
        if window is None:
            return past >= anchors, rows.triu(1)
        own = anchors + torch.arange(width, device=device)[:, None]
        return (past >= anchors) | (past <= own - window), rows.triu(1) | rows.tril(-window)

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        batch, count, width = self._shape
        past_keys, past_values = self._teaching.keys_values[layer]  # [B, kv_heads, T, D]
        kv_heads, length, dim = past_keys.shape[1:]
        group = queries.shape[1] // kv_heads
        # [B, kv_heads, A, group, G, D]
        asking = (
            (queries * self._config.attention_scale)
            .view(batch, count, width, group, kv_heads, dim)
            .permute(0, 4, 1, 3, 2, 5)
        )
        # [B, kv_heads, A, 1, G, D]
        own = keys_values.view(batch, count, width, 2 * kv_heads, dim).permute(0, 3, 1, 2, 4)[:, :, :, None]
        own_keys, own_values = own.chunk(2, 1)
        to_past = asking.flatten(2, 4) @ past_keys.transpose(-1, -2)
        to_past, to_own = to_past.view(*asking.shape[:-1], length), asking @ own_keys.transpose(-1, -2)
        to_past, to_own = (softcapped(scores, self._config.attention_softcap) for scores in (to_past, to_own))
        hidden_past, hidden_own = self._hidden[self._config.windows[layer]]
        to_past = to_past.masked_fill(hidden_past, float("-inf"))
        to_own = to_own.masked_fill(hidden_own, float("-inf"))
        weights = torch.cat((to_past, to_own), -1).softmax(-1)
        out = (weights[..., :length].flatten(2, 4) @ past_values).view(asking.shape)
        out = out + weights[..., length:] @ own_values
        return out.permute(0, 2, 4, 3, 1, 5).reshape(batch * count * width, -1)
