"""One decoder for the Llama family and its kin, executing a plan of layers over flat rows.

What a family has beyond a Llama is a setting of `ModelConfig`; one that is not in use is left
out when the module is built, so that it costs a step nothing.

A pass is a `TokenBatch` of rows from any mix of sequences, a `Plan` that names the layers
to run through, and the attention that knows where each row's past is cached. A draft is
the same pass with a shorter plan: nothing is copied or switched to skip a layer.

Parameters carry Hugging Face's names (`families` brings a checkpoint's values into the order used
here), and the module can be trained. `pack` then replaces the matrices by fused ones laid out for
inference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skippy.engine.attention import PassAttention
from skippy.engine.linear import Pack, RowLinear, Tiling, common_tiling
from skippy.engine.rope import rope_tables
from skippy.engine.shape import ModelConfig, Plan
from skippy.engine.tensors import TokenBatch


class Adapter(Protocol):
    """What changes on the rows of a pass that draft. The others come out as without it."""

    @property
    def first_row(self) -> int:
        """The first of the rows that draft; all that follow do so, too, or are padding."""
        ...

    def embed(self, token_ids: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        """token_ids [N], which may lie beyond the vocabulary, to [N, hidden_size]."""
        ...

    def enter(self, layer: int, x: Tensor) -> Tensor:
        """x [N, hidden_size] on its way into a layer; `num_hidden_layers` stands for the end."""
        ...

    def product(self, layer: int, part: str, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the layer's product of x [N, in_features] is to be, [N, out_features].

        part is "qkv", "o", "gate_up" or "down"; linear computes it as the verifier has it.
        """
        ...


class _Fused:
    """Linears that read the same input: one product once packed, one each until then."""

    def __init__(self, *linears: nn.Linear) -> None:
        self._linears = linears
        self.packed: RowLinear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in_features] to [N, sum of out_features]."""
        if self.packed is not None:
            return self.packed(x)
        outputs = [linear(x) for linear in self._linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight [sum of out_features, in_features] and the bias, until they are packed."""
        biases = [linear.bias.detach() for linear in self._linears if linear.bias is not None]
        return torch.cat([linear.weight.detach() for linear in self._linears]), torch.cat(biases) if biases else None

    def pack(self, pack: Pack | None = None) -> RowLinear:
        """Fuse, and give the memory of the separate matrices back; once is enough."""
        if self.packed is not None:
            return self.packed
        weight, bias = self.parameters()
        for linear in self._linears:
            linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self.packed = RowLinear(weight, bias, pack)
        return self.packed


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._eps = torch.tensor(eps, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            if self.weight.dtype != x.dtype:  # kept in float32
                return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.by(x, self.weight)

    def by(self, x: Tensor, weight: Tensor) -> Tensor:
        """x normalised along its last dimension, times a weight of any shape that suits it; on a CPU only."""
        # On CPU rms_norm is twice as many operations, which is what a small model's step consists of.
        norm = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]))
        return (x * scale * weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the layers of one pass share."""

    rotations: list[tuple[Tensor, Tensor]]  # cos and sin of the rows, [N, 1, head_dim] each, by rotary embedding
    attend: PassAttention
    adapter: Adapter | None

    def product(self, layer: int, part: str, linear: _Fused, x: Tensor) -> Tensor:
        return linear(x) if self.adapter is None else self.adapter.product(layer, part, linear, x)


class SelfAttention(nn.Module):
    """Grouped-query attention. Query head h reads KV head h % num_kv_heads (see `families`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=config.attention_out_bias)
        self.qkv = _Fused(self.q_proj, self.k_proj, self.v_proj)
        self.out = _Fused(self.o_proj)
        local = config.local_rope_parameters is not None and layer in config.sliding_layers
        self._rotation = None if layer in config.nope_layers else int(local)
        self._qk_norm = config.qk_norm
        if config.qk_norm is not None:
            together = config.qk_norm == "all"
            self.q_norm = RMSNorm(self.head_dim * (self.num_heads if together else 1), config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim * (self.num_kv_heads if together else 1), config.rms_norm_eps)
        self._qk_weight: Tensor | None = None  # [heads + kv_heads, head_dim], once packed

    def pack_norms(self) -> None:
        """Let one norm do for queries and keys, where operations are dear; a GPU has one that is made of one kernel."""
        if self._qk_norm == "head" and self.q_norm.weight.device.type == "cpu":
            heads = self.q_norm.weight.expand(self.num_heads, -1), self.k_norm.weight.expand(self.num_kv_heads, -1)
            self._qk_weight = torch.cat(heads).detach()

    def forward(self, x: Tensor, layer: int, shared: _Pass) -> Tensor:
        qkv = shared.product(layer, "qkv", self.qkv, x).view(len(x), -1, self.head_dim)
        before = after = qkv[:, : -self.num_kv_heads]
        if self._qk_norm is not None:
            after = self._normalise(before)
        if self._rotation is not None:
            cos, sin = shared.rotations[self._rotation]
            turned = after.roll(self.head_dim // 2, -1)
            if torch.is_grad_enabled():
                after = torch.addcmul(after * cos, turned, sin)
            else:
                after = torch.addcmul(after * cos, turned, sin, out=before)
        if after is not before:
            qkv = torch.cat((after, qkv[:, -self.num_kv_heads :]), 1)
        attended = shared.attend(layer, qkv[:, : self.num_heads], qkv[:, self.num_heads :])
        return shared.product(layer, "o", self.out, attended)

    def _normalise(self, x: Tensor) -> Tensor:
        """Queries and keys [N, heads + kv_heads, head_dim], normalised."""
        if self._qk_weight is not None:
            return self.q_norm.by(x, self._qk_weight)
        q, k = torch.split(x, [self.num_heads, self.num_kv_heads], 1)
        if self._qk_norm == "all":
            q, k = self.q_norm(q.flatten(1)).view(q.shape), self.k_norm(k.flatten(1)).view(k.shape)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        return torch.cat((q, k), 1)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.gate_up = _Fused(self.gate_proj, self.up_proj)
        self.down = _Fused(self.down_proj)
        self._activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, layer: int, shared: _Pass) -> Tensor:
        gate, up = shared.product(layer, "gate_up", self.gate_up, x).chunk(2, dim=-1)
        return shared.product(layer, "down", self.down, by_rows(self._activation, gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        names = config.norm_names
        self._norms = [None if name is None else RMSNorm(config.hidden_size, config.rms_norm_eps) for name in names]
        for name, norm in zip(names, self._norms, strict=True):
            if name is not None:
                self.add_module(name, norm)
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        multiplier = config.residual_multiplier
        self._add = operator.add if multiplier == 1.0 else partial(torch.add, alpha=multiplier)

    def forward(self, x: Tensor, layer: int, shared: _Pass) -> Tensor:
        before_attention, behind_attention, before_mlp, behind_mlp = self._norms
        y = self.self_attn(x if before_attention is None else before_attention(x), layer, shared)
        x = self._add(x, y if behind_attention is None else behind_attention(y))
        y = self.mlp(x if before_mlp is None else before_mlp(x), layer, shared)
        out: Tensor = self._add(x, y if behind_mlp is None else behind_mlp(y))
        return out


class Embedding(nn.Embedding):
    """torch's, but on the meta device, where there is nothing to draw, it draws nothing."""

    def reset_parameters(self) -> None:
        # PyTorch would import its compiler for a normal distribution there, which takes a second.
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """embed_tokens, layers, norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder and its head, with parameters under Hugging Face's names.

    Args:
        max_len: positions that the rotary tables cover.
    """

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_len = max_len
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._multiplier = None
        if config.embedding_multiplier != 1.0:
            self._multiplier = torch.tensor(config.embedding_multiplier, device="cpu")
        self._rope: list[tuple[Tensor, Tensor]] = []
        self._packed_head: tuple[RowLinear, ...] = ()
        self._draft_ids: Tensor | None = None  # [D] int64
        self._row_of_token: Tensor | None = None  # [V] int64, where the head was reordered
        self._embedding_reordered = False

    def forward(
        self,
        batch: TokenBatch,
        plan: Plan,
        attend: PassAttention,
        adapter: Adapter | None = None,
        taps: Collection[int] = (),
        checkpointing: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the rows of `batch` through the layers of `plan`.

        Returns the last hidden states, not yet normalised, [N, hidden_size], and of every
        layer in `taps` the hidden states that entered it.

        Args:
            checkpointing: for the backward pass keep only what enters each layer, and compute
                the rest a second time (arXiv 1604.06174).
        """
        x = self.embed(batch.token_ids) if adapter is None else adapter.embed(batch.token_ids, self.embed)
        rotations = [(cos[batch.positions], sin[batch.positions]) for cos, sin in self._rope_tables(x)]
        shared = _Pass(rotations, attend, adapter)
        tapped: dict[int, Tensor] = {}
        for index in plan:
            if adapter is not None:
                x = adapter.enter(index, x)
            if index in taps:
                tapped[index] = x
            layer = self.model.layers[index]
            if checkpointing:
                x = checkpoint(layer, x, index, shared, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, index, shared)
        end = self.config.num_hidden_layers
        if adapter is not None:
            x = adapter.enter(end, x)
        if end in taps:
            tapped[end] = x
        return x, tapped

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters the first layer. [...] int64 to [..., hidden_size]."""
        x = self._embedding_rows(token_ids)
        # Rounded to the type of the embeddings, as the models were trained.
        return x if self._multiplier is None else x * self._multiplier.to(x.dtype)

    def _embedding_rows(self, token_ids: Tensor) -> Tensor:
        if self._embedding_reordered and self._row_of_token is not None:
            token_ids = self._row_of_token[token_ids]
        return F.embedding(token_ids, self.model.embed_tokens.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, hidden_size], M padded like a batch, to [M, vocabulary] float32."""
        logits = self._head_product(self.normalise(hidden), None)
        return logits if self._row_of_token is None else logits[:, self._row_of_token]

    def draft_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the tokens that are worth drafting, and which tokens they are.

        hidden [M, hidden_size] to [M, D] float32 and [D] int64, or None if it is all of them.
        """
        if self._draft_ids is None:
            return self.logits(hidden), None
        return self._head_product(self.normalise(hidden), len(self._draft_ids)), self._draft_ids

    def normalise(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., hidden_size] to what meets the head."""
        x: Tensor = self.model.norm(hidden)
        return x if self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def cap(self, logits: Tensor) -> Tensor:
        """Products with the head to logits, of the same shape."""
        return softcapped(logits, self.config.logit_softcap)

    def _head_product(self, x: Tensor, rows: int | None) -> Tensor:
        """x [M, hidden_size], normalised, to the logits of the first `rows` rows of the head, float32."""
        return self.cap(self._uncapped(x, rows))

    def _uncapped(self, x: Tensor, rows: int | None) -> Tensor:
        if self._packed_head:
            parts = [part(x.float()) for part in (self._packed_head if rows is None else self._packed_head[:1])]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        weight = self.lm_head.weight[:rows]
        if x.dtype == torch.float32:
            return F.linear(x, weight)
        if x.device.type == "cuda":
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    def product_parameters(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a fused product, until they are packed; part as in `Adapter.product`."""
        decoder = self.model.layers[layer]
        assert isinstance(decoder, DecoderLayer)
        attention, mlp = decoder.self_attn, decoder.mlp
        products = {"qkv": attention.qkv, "o": attention.out, "gate_up": mlp.gate_up, "down": mlp.down}
        return products[part].parameters()

    @cached_property
    def embedding_scale(self) -> float:
        """1 / rms of all embeddings: what brings the output of `embed` to about unit size."""
        weight = self.model.embed_tokens.weight
        rms = torch.linalg.vector_norm(weight, dtype=torch.float32) / weight.numel() ** 0.5
        return 1.0 / float(rms * self.config.embedding_multiplier)

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """The rows of the head that belong to some tokens. token_ids [...] to [..., hidden_size]."""
        if self.config.tie_word_embeddings:
            return self._embedding_rows(token_ids)
        rows = token_ids if self._row_of_token is None else self._row_of_token[token_ids]
        return F.embedding(rows, self.lm_head.weight)

    def pack_layer(self, layer: int, pack: Pack | None = None) -> list[RowLinear]:
        """Lay the matrices of one layer out for inference, as `RowLinear` does, where that is not done yet."""
        decoder = self.model.layers[layer]
        assert isinstance(decoder, DecoderLayer)
        fused = (decoder.self_attn.qkv, decoder.self_attn.out, decoder.mlp.gate_up, decoder.mlp.down)
        decoder.self_attn.pack_norms()
        return [matrices.pack(pack) for matrices in fused]

    def pack(
        self,
        vocab_size: int,
        *,
        draft_ids: Tensor | None = None,
        keep_head_rows: bool = False,
        pack_layers: Pack | None = None,
    ) -> Tiling:
        """Lay the matrices out for inference; the module cannot be trained any more.

        Only the first `vocab_size` rows of the head are kept: a checkpoint may pad its
        vocabulary, and a padded row must never be chosen. `head_rows` works afterwards if the
        embeddings are the head, or with `keep_head_rows`. Returns the tiling of rows that
        batches must keep.

        Args:
            draft_ids: [D] int64, the tokens of `draft_logits`. Their rows of the head come first
                from now on, so that a view of it, and no copy, is what drafts read.
            pack_layers: lays out the layers that are not laid out yet, as in `RowLinear`.
        """
        layers = range(self.config.num_hidden_layers)
        packed = [matrices for layer in layers for matrices in self.pack_layer(layer, pack_layers)]
        head = self.lm_head.weight.detach()[:vocab_size]
        sizes = [vocab_size]
        if draft_ids is not None:
            rest = torch.ones(vocab_size, dtype=torch.bool, device=head.device).index_fill_(0, draft_ids, False)
            order = torch.cat((draft_ids, rest.nonzero()[:, 0]))
            head = head[order]
            sizes = [len(draft_ids), vocab_size - len(draft_ids)]
            self._draft_ids, self._row_of_token = draft_ids, order.argsort()
        if head.device.type == "cpu":
            # There is no product of bfloat16 with a float32 result on CPU, so the head is widened.
            self._packed_head = tuple(RowLinear(part.float()) for part in torch.split(head, sizes))
            packed += self._packed_head
        elif self.config.tie_word_embeddings:
            self._embedding_reordered = True
            self.model.embed_tokens.weight = nn.Parameter(head, requires_grad=False)
        if self._packed_head and not keep_head_rows:
            self.lm_head.weight = nn.Parameter(head.new_empty(0), requires_grad=False)
        else:
            self.lm_head.weight = nn.Parameter(head, requires_grad=False)
        return common_tiling([matrices.tiling for matrices in packed])

    def prepare_rope(self, dtype: torch.dtype, device: torch.device) -> None:
        """Build the rotary tables now, so that settings of no use are known at once.

        Raises:
            ArithmeticError, KeyError, TypeError, ValueError, RuntimeError: they are of no use.
        """
        ropes = [self.config.rope_parameters, self.config.local_rope_parameters]
        self._rope = [rope_tables(self.config, rope, self.max_len, dtype, device) for rope in ropes if rope is not None]

    def _rope_tables(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not self._rope or self._rope[0][0].dtype != like.dtype or self._rope[0][0].device != like.device:
            self.prepare_rope(like.dtype, like.device)
        return self._rope


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """x brought smoothly within softcap of 0 (arXiv 2408.00118, section 2); None leaves it as it is."""
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def by_rows(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """activation(x) with every row computed alike. x [N, features], a part of wider rows.

    On CPU PyTorch computes whole vectors with one approximation of exp and the tail of each
    thread's share with another, so where a thread's share ends would show in the result.
    Below 32,768 elements one thread does it all; a row of a wider view never shares a vector
    with the next row.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return activation(x)
    rows = max(1, 32768 // x.shape[-1])
    if len(x) <= rows:
        return activation(x)
    return torch.cat([activation(part) for part in torch.split(x, rows)])


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
