"""The S3D adapter: what a model needs to draft for itself (arXiv 2405.20314).

A draft pass runs the newest token and some mask tokens through the layers outside the skip
band. The adapter adds to it, on those rows only:

    masks    embeddings that stand for tokens not known yet
    LoRA     low-rank changes of the kept layers' matrices (arXiv 2106.09685)
    bridge   at the end of the band, what the skipped layers did one token ago
    head     a small recurrent net that ties the drafted tokens to one another
    ids      the tokens worth drafting, where the vocabulary is large: rows of the model's head

In the fused variant there is no draft pass: masks ride in the verify pass, through every
layer, behind each row that chooses a token. Those behind the last accepted row draft next.

The rows of a draft are computed at once, so none knows which token the others will become.
The head goes over them in order: it takes the row's hidden state and the token drafted
before, and corrects the hidden state before it meets the model's final norm and head.
Verified rows never meet any of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skippy.engine.config import MAX_SPECULATIVE_TOKENS
from skippy.engine.linear import RowLinear
from skippy.engine.model import CausalLM
from skippy.engine.shape import ModelConfig

DEFAULT_WIDTH = 6
"""Tokens that an adapter drafts at most, if nobody says."""
PARTS = ("qkv", "o", "gate_up", "down")
MAX_RANK = 2**16
"""Of LoRA, bridge and head: a limit for nonsense, not for memory."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The shape of an adapter. A rank or size of 0 leaves the part out.

    Attributes:
        skip_start, skip_end: the layers [skip_start, skip_end) are skipped.
        num_speculative_tokens: the most tokens one pass drafts, one per row.
        recurrent: whether the head hands a state from row to row.
        fused: whether the rows ride in the verify pass, all of them masks; nothing is skipped then.
        draft_vocab_size: how many tokens can be drafted, the most frequent ones; 0 for all.
    """

    skip_start: int
    skip_end: int
    num_speculative_tokens: int
    lora_rank: int
    head_size: int
    bridge_rank: int
    recurrent: bool
    fused: bool = False
    draft_vocab_size: int = 0

    @property
    def num_masks(self) -> int:
        """In a pass of its own a draft begins with the newest token, which needs no mask."""
        return self.num_speculative_tokens - (not self.fused)

    def check(self, base: ModelConfig) -> None:
        """Raise ValueError unless an adapter of this shape fits a base."""
        layers = base.num_hidden_layers
        for name, least, most in (
            ("skip_start", 0, layers),
            ("skip_end", 0, layers),
            ("num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS),
            ("lora_rank", 0, MAX_RANK),
            ("head_size", 0, MAX_RANK),
            ("bridge_rank", 0, MAX_RANK),
            ("draft_vocab_size", 0, base.vocab_size - 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:  # bool is a kind of int
                raise ValueError(f"{name} is {value!r}, not an integer from {least} to {most}")
        if type(self.recurrent) is not bool:
            raise ValueError(f"recurrent is {self.recurrent!r}, not true or false")
        if self.skip_start > self.skip_end:
            raise ValueError(f"the skip band [{self.skip_start}, {self.skip_end}) ends before it starts")
        if self.skip_end - self.skip_start == layers:
            raise ValueError(f"the skip band [{self.skip_start}, {self.skip_end}) leaves no layer of {layers}")
        if not isinstance(self.fused, bool):
            raise ValueError(f"fused is {self.fused!r}")
        if self.fused and (self.skip_start != self.skip_end or self.bridge_rank):
            raise ValueError("a fused adapter skips no layer, so there is nothing to bridge either")


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) features of every fused product of a layer."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * head_dim),
        "o": (heads * head_dim, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


def part_sizes(adapter: AdapterConfig, base: ModelConfig) -> dict[str, int]:
    """How many numbers each part of an adapter holds."""
    hidden, size = base.hidden_size, adapter.head_size
    kept = base.num_hidden_layers - (adapter.skip_end - adapter.skip_start)
    return {
        "masks": adapter.num_masks * hidden,
        "lora": kept * adapter.lora_rank * sum(sum(shape) for shape in part_shapes(base).values()),
        "bridge": hidden + adapter.bridge_rank * 3 * hidden if adapter.bridge_rank else 0,
        "head": 3 * hidden * size + size + (size * size if adapter.recurrent else 0),
    }


def _drawn(rows: int, columns: int, scale: float) -> nn.Parameter:
    """Normal numbers of this scale; on the meta device nothing is drawn (see `model.Embedding`)."""
    if torch.get_default_device().type == "meta":
        return nn.Parameter(torch.empty(rows, columns))
    return nn.Parameter(torch.randn(rows, columns) * scale)


class LowRank(nn.Module):
    """x to x A B, zero at first. A [in, rank], B [rank, out]."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.a = _drawn(in_features, rank, in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(rank, out_features))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x A B, in place where no gradient is wanted. x [N, in], y [N, out]."""
        a: Tensor = self.a
        b: Tensor = self.b
        if a.dtype != x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        return torch.addmm(y, x @ a, b) if torch.is_grad_enabled() else y.addmm_(x @ a, b)


def _rounded_product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> RowLinear:
    """By a weight [out, in] rounded to float16, which the fastest kernel takes; a draft need not be exact."""
    rounded = weight.detach().half().to(dtype).contiguous()
    return RowLinear(rounded, None if bias is None else bias.detach().to(dtype))


class Bridge(nn.Module):
    """What the skipped layers added one token ago, and where that token ended, to a correction.

    The sum of a gain per channel on the first and a low-rank map of both, normalised.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(hidden_size))
        self.low_rank = LowRank(2 * hidden_size, hidden_size, rank)

    def forward(self, context: Tensor) -> Tensor:
        """context [N, 2, hidden_size] (see `S3DAdapter.bind`) to [N, hidden_size]."""
        unit = F.rms_norm(context, context.shape[-1:])
        return self.low_rank.add_to(context[:, 0] * self.gain.to(context.dtype), unit.flatten(1))


class SequentialHead(nn.Module):
    """Corrects row j's hidden state by the token drafted before it, and by a state if recurrent.

    z_j = silu(norm(h_j) W_h + c + E[d_(j-1)] W_e / rms(E) + z_(j-1) U), h_j + z_j W_out, with E
    the model's embeddings and rms(E) one number.
    """

    def __init__(self, hidden_size: int, size: int, *, recurrent: bool) -> None:
        super().__init__()
        self.from_hidden = _drawn(hidden_size, size, (3 * hidden_size) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        self.from_token = _drawn(hidden_size, size, (3 * hidden_size) ** -0.5)
        self.from_state = nn.Parameter(torch.zeros(size, size)) if recurrent else None
        self.out = nn.Parameter(torch.zeros(size, hidden_size))
        self._packed: tuple[RowLinear, RowLinear, RowLinear] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it is laid out for inference."""
        return self._packed is not None

    def pack(self) -> None:
        """Lay the matrices out for inference on a CPU; the head cannot be trained any more."""
        before = self.from_token if self.from_state is None else torch.cat((self.from_token, self.from_state))
        prepare = _rounded_product(self.from_hidden.t(), self.bias, self.bias.dtype)
        step = _rounded_product(before.t(), None, self.bias.dtype)
        self._packed = prepare, step, _rounded_product(self.out.t(), None, self.bias.dtype)

    def prepare(self, hidden: Tensor) -> Tensor:
        """What the rows contribute, whatever is drafted. hidden [..., hidden_size] to [..., size]."""
        unit = F.rms_norm(hidden, hidden.shape[-1:])
        if self._packed is not None:
            return self._packed[0](unit.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        return unit @ self.from_hidden.to(hidden.dtype) + self.bias.to(hidden.dtype)

    def step(self, prepared: Tensor, token: Tensor, scale: float, state: Tensor | None) -> Tensor:
        """The state after a row, [N, size].

        prepared [N, size]; token [N, hidden_size], its embedding, and scale = 1 / rms(E); state [N, size].
        """
        if self._packed is not None:
            before = token * scale
            if self.from_state is not None:
                before = torch.cat((before, torch.zeros_like(prepared) if state is None else state), -1)
            return F.silu(self._packed[1](before) + prepared)
        # One operation for product, scale and sum: a small model's draft is made of small operations.
        z = torch.addmm(prepared, token, self.from_token.to(token.dtype), alpha=scale)
        if self.from_state is not None and state is not None:
            z = torch.addmm(z, state, self.from_state.to(state.dtype))
        return F.silu(z)

    def correct(self, hidden: Tensor, state: Tensor) -> Tensor:
        """[N, hidden_size]."""
        if self._packed is not None:
            return hidden + self._packed[2](state)
        return torch.addmm(hidden, state, self.out.to(state.dtype))


class S3DAdapter(nn.Module):
    """The trained parts of a drafter, for a base of one shape."""

    def __init__(self, config: AdapterConfig, base: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = base.vocab_size
        self.kept = [i for i in range(base.num_hidden_layers) if not config.skip_start <= i < config.skip_end]
        self.masks = _drawn(config.num_masks, base.hidden_size, 0.02)
        shapes = part_shapes(base)
        # Found once per product and layer: the path through the modules' names would take as long as the product.
        self.low_ranks = {
            (i, part): LowRank(*shapes[part], config.lora_rank) for i in self.kept for part in PARTS if config.lora_rank
        }
        self.lora = nn.ModuleDict({f"{i}_{part}": module for (i, part), module in self.low_ranks.items()})
        self.folded: dict[tuple[int, str], RowLinear] = {}
        self.bridge = Bridge(base.hidden_size, config.bridge_rank) if config.bridge_rank else None
        self.head = (
            SequentialHead(base.hidden_size, config.head_size, recurrent=config.recurrent) if config.head_size else None
        )
        ids = torch.arange(config.draft_vocab_size) if config.draft_vocab_size else None
        self.draft_ids: Tensor | None  # [D] int64, the most frequent first
        self.register_buffer("draft_ids", ids)

    def fold(self, model: CausalLM, layer: int) -> None:
        """Give a layer, if a draft pass keeps it, matrices of its own for that pass, LoRA included.

        For a CPU, where memory is cheap and operations are dear. They are of the adapter's type. The layer must not
        be packed yet.
        """
        for (at, part), low_rank in self.low_ranks.items():
            if at != layer:
                continue
            weight, bias = model.product_parameters(layer, part)
            changed = weight.float() + (low_rank.a @ low_rank.b).t().float()
            self.folded[layer, part] = _rounded_product(changed, bias, self.masks.dtype)

    def bind(self, context: Tensor | None, first_row: int = 0, draft_of_row: Tensor | None = None) -> BoundAdapter:
        """The adapter for one pass.

        Args:
            context: [B, 2, hidden_size], for each draft what the band [skip_start, skip_end)
                added to the token before the newest one, and that token's last hidden state.
                None without a bridge.
            first_row: the rows from here to the end are the drafter's.
            draft_of_row: [R] int64, the draft that each of its rows belongs to; None if each is one.
        """
        return BoundAdapter(self, context, first_row, draft_of_row)

    def mask_ids(self, count: int) -> list[int]:
        """The token ids that stand for the first `count` masks."""
        return list(range(self.vocab_size, self.vocab_size + count))


class BoundAdapter:
    """An adapter and what it needs to know of one pass; the model's `Adapter`."""

    def __init__(
        self, adapter: S3DAdapter, context: Tensor | None, first_row: int, draft_of_row: Tensor | None
    ) -> None:
        self._adapter = adapter
        self._context = context
        self._draft_of_row = draft_of_row
        self.first_row = first_row

    def embed(self, token_ids: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        """token_ids [N], some of them of masks, to [N, hidden_size]."""
        masks, size = self._adapter.masks, self._adapter.vocab_size
        x = embedding(token_ids.masked_fill(token_ids >= size, 0))
        if len(masks) == 0:
            return x
        of_mask = masks[(token_ids - size).clamp(min=0)].to(x.dtype)
        return torch.where((token_ids >= size)[:, None], of_mask, x)

    def enter(self, layer: int, x: Tensor) -> Tensor:
        """x [N, hidden_size] on its way into a layer."""
        bridge = self._adapter.bridge
        if bridge is None or self._context is None or layer != self._adapter.config.skip_end:
            return x
        delta: Tensor = bridge(self._context)
        if self._draft_of_row is not None:
            delta = delta[self._draft_of_row]
        if len(delta) == len(x):
            return x + delta
        x[self.first_row : self.first_row + len(delta)] += delta  # what follows is padding
        return x

    def product(self, layer: int, part: str, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The product of x [N, in] and, on the rows that draft, what LoRA adds to it: [N, out]."""
        folded = self._adapter.folded.get((layer, part)) if self.first_row == 0 else None
        if folded is not None:
            return folded(x)
        y, low_rank = linear(x), self._adapter.low_ranks.get((layer, part))
        if low_rank is None:
            return y
        if self.first_row == 0:
            return low_rank.add_to(y, x)
        low_rank.add_to(y[self.first_row :], x[self.first_row :])  # in place: no such pass is trained
        return y
