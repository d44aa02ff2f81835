"""The two passes of a training step, over whole sequences at once.

The teacher pass is the plain model over [B, T] tokens. The draft pass puts rows at many
places ("anchors") of every sequence: the token there and mask tokens behind it, which see
the teacher's keys and values of what precedes the anchor, and one another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.model import CausalLM, full_plan, skipping_plan
from skippy.engine.tensors import TokenBatch


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the teacher pass leaves behind."""

    tokens: Tensor  # [B, T] int64
    keys_values: dict[int, Tensor]  # by layer, [B, T, 2 * kv_heads, head_dim]
    context: Tensor  # [B, T, 2, hidden_size], see S3DAdapter.bind
    hidden: Tensor  # [B, T, hidden_size], last and not normalised


@torch.no_grad()
def teach(model: CausalLM, adapter: S3DAdapter, tokens: Tensor) -> Teaching:
    """Run the plain model. tokens [B, T] int64."""
    batch, length = tokens.shape
    attend = _CausalAttention(model, batch, length, set(adapter.kept))
    start, end = adapter.config.skip_start, adapter.config.skip_end
    hidden, taps = model(_token_batch(tokens, torch.arange(length).repeat(batch)), full_plan(model.config), attend,
                         taps={start, end})
    context = torch.stack((taps[end] - taps[start], hidden), 1)
    return Teaching(tokens, attend.cached, context.unflatten(0, (batch, length)), hidden.unflatten(0, (batch, length)))


def draft_rows(model: CausalLM, adapter: S3DAdapter, teaching: Teaching, anchors: Tensor) -> Tensor:
    """The last hidden states of the draft rows at anchors [B, A] int64, [B, A, G, hidden_size].

    An anchor is the place of a newest token; the place before it must exist.
    """
    width = adapter.config.num_speculative_tokens
    batch, count = anchors.shape
    newest = teaching.tokens.gather(1, anchors)
    masks = torch.tensor(adapter.mask_ids(width - 1), dtype=torch.int64).expand(batch, count, -1)
    tokens = torch.cat((newest[:, :, None], masks), -1)
    positions = anchors[:, :, None] + torch.arange(width)
    before = (anchors - 1)[:, :, None, None].expand(-1, -1, 2, teaching.context.shape[-1])
    context = teaching.context.gather(1, before).repeat_interleave(width, 1).flatten(0, 1)
    attend = _AnchorAttention(model, teaching, anchors, width)
    plan = skipping_plan(model.config, adapter.config.skip_start, adapter.config.skip_end)
    hidden, _ = model(_token_batch(tokens, positions.flatten()), plan, attend, adapter.bind(context))
    return hidden.view(batch, count, width, -1)


def _token_batch(tokens: Tensor, positions: Tensor) -> TokenBatch:
    nothing = torch.empty(0, dtype=torch.int64)
    return TokenBatch(tokens.flatten(), positions, slots=nothing, segments=[], logit_rows=nothing)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries [B, R, heads, D]; keys, values [B, S, kv_heads, D]; mask [B or 1, R, S] to [B * R, heads * D]."""
    batch, rows, heads, dim = queries.shape
    group = heads // keys.shape[2]
    folded = queries.reshape(batch, rows * group, -1, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        folded, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask.repeat_interleave(group, 1)[:, None]
    )
    return out.transpose(1, 2).reshape(batch * rows, heads * dim)


class _CausalAttention:
    """Of the teacher: causal within each sequence. Keeps the keys and values of some layers."""

    def __init__(self, model: CausalLM, batch: int, length: int, keep: set[int]) -> None:
        self.cached: dict[int, Tensor] = {}
        self._shape = (batch, length)
        self._keep = keep
        self._mask = torch.ones(1, length, length, dtype=torch.bool).tril()

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        keys_values = keys_values.unflatten(0, self._shape)
        if layer in self._keep:
            self.cached[layer] = keys_values
        keys, values = keys_values.chunk(2, 2)
        return _attend(queries.unflatten(0, self._shape), keys, values, self._mask)


class _AnchorAttention:
    """Of draft rows: to what precedes their anchor, and causally to the rows of the same anchor."""

    def __init__(self, model: CausalLM, teaching: Teaching, anchors: Tensor, width: int) -> None:
        self._teaching = teaching
        self._shape = (len(anchors), anchors.shape[1] * width)
        before = torch.arange(teaching.tokens.shape[1]) < anchors.repeat_interleave(width, 1)[:, :, None]
        anchor = torch.arange(anchors.shape[1]).repeat_interleave(width)
        own = (anchor[:, None] == anchor) & torch.ones(len(anchor), len(anchor), dtype=torch.bool).tril()
        self._mask = torch.cat((before, own.expand(len(anchors), -1, -1)), -1)

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        rows = keys_values.unflatten(0, self._shape)
        keys, values = torch.cat((self._teaching.keys_values[layer], rows), 1).chunk(2, 2)
        return _attend(queries.unflatten(0, self._shape), keys, values, self._mask)
