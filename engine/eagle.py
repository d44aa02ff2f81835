"""A published EAGLE-3 head (arXiv 2503.01840): one decoder layer that drafts from the verifier's hidden states.

A row stands for a position p whose token's successor is known. Its input is what the
verifier computed at p, three layers' hidden states side by side, brought to one size by `fc`,
and the embedding of the token at p + 1; its output, normalised, meets a head of its own, over
a smaller vocabulary, and says what follows. A row that drafts on takes the output of the row
before in place of the verifier's states.

The folder is as the authors, SGLang and SpecForge publish it: config.json of the architecture
LlamaForCausalLMEagle3 and safetensors with fc, midlayer.*, norm, lm_head and, where the
vocabulary is smaller, d2t: what to add to a drafted id to get the model's. Without embeddings
of its own the head uses the model's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from skippy.engine.attention import PassAttention
from skippy.engine.errors import AdapterError
from skippy.engine.families import parameters, parse_config
from skippy.engine.model import Embedding, RMSNorm
from skippy.engine.rope import rope_tables
from skippy.engine.shape import ModelConfig
from skippy.engine.weights import Checkpoint

ARCHITECTURE = "LlamaForCausalLMEagle3"
NUM_TAPS = 3
_NOT_READ = ("t2d",)
"""The inverse of d2t, which only training needs."""


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """The shape of a head.

    Attributes:
        layer: of its decoder layer, whose attention reads rows of twice the hidden size.
        taps: the layers of the model whose input it reads.
        target_hidden_size: the model's hidden size.
        draft_vocab_size: how many tokens it can draft.
        norm_before_residual: whether the residual stream starts from the normalised state.
        has_embeddings: whether it brings its own.
    """

    layer: ModelConfig
    taps: tuple[int, ...]
    target_hidden_size: int
    draft_vocab_size: int
    norm_before_residual: bool
    has_embeddings: bool


class EagleHead(nn.Module):
    """The head, with parameters under their published names.

    Args:
        max_len: positions that the rotary tables cover.
    """

    def __init__(self, config: EagleConfig, max_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_len = max_len
        layer, hidden = config.layer, config.layer.hidden_size
        self.fc = nn.Linear(NUM_TAPS * config.target_hidden_size, hidden, bias=False)
        self.midlayer = _EagleLayer(layer, norm_before_residual=config.norm_before_residual)
        self.norm = RMSNorm(hidden, layer.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.d2t: Tensor
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.embed_tokens = Embedding(layer.vocab_size, hidden) if config.has_embeddings else None
        self._rope: tuple[Tensor, Tensor] | None = None

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: PassAttention) -> Tensor:
        """Rows of any sequences through the layer.

        Args:
            embeds: [N, hidden_size], of the tokens behind the positions.
            states: [N, hidden_size], the model's states through `fc`, or outputs of this.
            positions: [N] int64.

        Returns:
            [N, hidden_size], not normalised.
        """
        if self._rope is None:
            layer = self.config.layer
            self._rope = rope_tables(layer, layer.rope_parameters, self.max_len, states.dtype, states.device)
        cos, sin = (table[positions] for table in self._rope)
        out: Tensor = self.midlayer(embeds, states, cos, sin, attend)
        return out

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, hidden_size] to logits [B, D] float32 of the tokens [D] int64."""
        ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        return self.lm_head(self.norm(hidden)).float(), ids


class _EagleLayer(nn.Module):
    def __init__(self, config: ModelConfig, *, norm_before_residual: bool) -> None:
        super().__init__()
        self._norm_before_residual = norm_before_residual
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.self_attn = _EagleAttention(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, hidden, bias=False),
            }
        )

    def forward(self, embeds: Tensor, states: Tensor, cos: Tensor, sin: Tensor, attend: PassAttention) -> Tensor:
        normed = self.hidden_norm(states)
        residual = normed if self._norm_before_residual else states
        x = residual + self.self_attn(torch.cat((self.input_layernorm(embeds), normed), -1), cos, sin, attend)
        inner = self.post_attention_layernorm(x)
        gate, up, down = (self.mlp[name] for name in ("gate_proj", "up_proj", "down_proj"))
        out: Tensor = x + down(F.silu(gate(inner)) * up(inner))
        return out


class _EagleAttention(nn.Module):
    """Query head h reads KV head h % num_kv_heads, as everywhere here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._heads, self._head_dim = config.num_attention_heads, config.head_dim
        wide, kv_size = 2 * config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(wide, self._heads * self._head_dim, bias=False)
        self.k_proj = nn.Linear(wide, kv_size, bias=False)
        self.v_proj = nn.Linear(wide, kv_size, bias=False)
        self.o_proj = nn.Linear(self._heads * self._head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: PassAttention) -> Tensor:
        """x [N, 2 * hidden_size] to [N, hidden_size]; cos and sin [N, 1, head_dim], see `rope_tables`."""
        queries, keys, values = (
            project(x).view(len(x), -1, self._head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (y * cos + y.roll(self._head_dim // 2, -1) * sin for y in (queries, keys))
        out: Tensor = self.o_proj(attend(0, queries, torch.cat((keys, values), 1)))
        return out


def is_eagle(folder: Path) -> bool:
    """Whether a folder looks like a published head, and not like an adapter of our own."""
    return (folder / "config.json").exists() and not (folder / "adapter.json").exists()


def load_eagle(path: Path, base: Checkpoint, dtype: torch.dtype, device: torch.device, max_len: int) -> EagleHead:
    """Read a head for a model.

    Raises:
        AdapterError: it is damaged, of another architecture, or does not fit the model.
    """
    raw = _read_json(path / "config.json")
    tensors = _read_tensors(path)
    config = _read_config(path, raw, base, tensors)
    with torch.device("meta"):
        head = EagleHead(config, max_len)
    wanted = head.state_dict()
    tensors.setdefault("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
            raise AdapterError(f"{path}: the tensor {name!r} is missing, left over or of another shape.")
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{path}: the tensor {name!r} holds values that are not finite.")
    ids = tensors["d2t"].long() + torch.arange(config.draft_vocab_size)
    if ids.min() < 0 or ids.max() >= base.vocab_size:
        raise AdapterError(f"{path}: 'd2t' names tokens that the model does not have.")
    arranged = (pair for name, tensor in tensors.items() for pair in parameters(name, tensor, config.layer))
    head.load_state_dict(
        {name: tensor.to(device, dtype if name != "d2t" else torch.int64) for name, tensor in arranged}, assign=True
    )
    return head.requires_grad_(False).eval()


def head_files(folder: Path) -> list[Path]:
    """The weights of a published head."""
    return sorted(folder.glob("*.safetensors"))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    files = head_files(path)
    if not files:
        raise AdapterError(
            f"{path} has no safetensors, and nothing else is read: a pickle (.bin) can run any code. If the head is "
            "published as one, load it where you trust it and write it with safetensors.torch.save_file."
        )
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            tensors.update(load_file(file))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Is the download complete?") from error
    return {name: tensor for name, tensor in tensors.items() if name not in _NOT_READ}


def _read_json(file: Path) -> dict[str, Any]:
    """Of a head; whatever else the folder holds is refused before its weights are read."""
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        architectures = raw.get("architectures")
    except (AttributeError, OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{file} is not a usable configuration: {error!r}.") from error
    if architectures != [ARCHITECTURE]:
        raise AdapterError(
            f"{file.parent} holds {architectures}, which is no adapter: there are Skippy's own and {ARCHITECTURE}."
        )
    return raw


def _read_config(path: Path, raw: dict[str, Any], base: Checkpoint, tensors: dict[str, Tensor]) -> EagleConfig:
    try:
        config = _parse(raw, base, "embed_tokens.weight" in tensors)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path / 'config.json'} is not a usable configuration: {error!r}.") from error
    layers, hidden = base.config.num_hidden_layers, base.config.hidden_size
    if config.target_hidden_size != hidden or (not config.has_embeddings and config.layer.hidden_size != hidden):
        raise AdapterError(
            f"The head in {path} is for a model whose hidden_size is {config.target_hidden_size}; this one's is "
            f"{hidden}."
        )
    if len(config.taps) != NUM_TAPS or not all(0 <= layer <= layers for layer in config.taps):
        raise AdapterError(f"The head in {path} reads the layers {list(config.taps)}; the model has {layers}.")
    if config.has_embeddings and config.layer.vocab_size < base.vocab_size:
        raise AdapterError(
            f"The head in {path} knows {config.layer.vocab_size} tokens; the model has {base.vocab_size}."
        )
    return config


def _parse(raw: dict[str, Any], base: Checkpoint, has_embeddings: bool) -> EagleConfig:
    if raw.get("num_hidden_layers", 1) != 1:
        raise ValueError(f"num_hidden_layers is {raw['num_hidden_layers']}, and only one is supported")
    layer = parse_config({**raw, "architectures": ["LlamaForCausalLM"]})
    if layer.attention_bias or layer.mlp_bias:
        raise ValueError("biases are not supported")
    layers = base.config.num_hidden_layers
    given = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return EagleConfig(
        layer=layer,
        taps=tuple(map(int, given)) if given else (2, layers // 2, layers - 3),
        target_hidden_size=int(raw.get("target_hidden_size") or layer.hidden_size),
        draft_vocab_size=int(raw.get("draft_vocab_size") or layer.vocab_size),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
        has_embeddings=has_embeddings,
    )
