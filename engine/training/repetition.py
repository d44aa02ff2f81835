"""Teaching a small language model not to repeat itself.

Greedy text of a small model falls into loops, which likelihood alone hardly punishes. Sequence-level unlikelihood
training (Welleck et al., arXiv 1908.04319) lets the model go on by itself and makes every token less likely that ends
a run of tokens that was there before. Not to go on at all would be the surest way not to repeat anything, so an early
end is as unwanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

KIND = "stories"
"""Code may well repeat itself; what is taken from its loops is taken from its bits per byte as well (RESULTS.md)."""
RUN = 6
"""Tokens in a row that must not come twice. Shorter runs cost spelling."""
SEQUENCES = 16
SHORTEST_OPENING, LONGEST_OPENING = 8, 48
CONTINUED = 112
"""Tokens that the model writes after an opening."""
SHORTEST = 32
"""Of these it must write before it ends."""
SUREST = 1.0 - 1e-4
"""Chances above it have no useful gradient in float32."""


@torch.no_grad()
def continued(model: LlamaForCausalLM, openings: Tensor, count: int) -> Tensor:
    """Sequences with what the model itself writes next, greedily: int64 [B, P] to [B, P + count]."""
    was = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # that of the training knows no cache
    tokens, cache = [openings], DynamicCache(config=model.config)
    try:
        with torch.autocast(openings.device.type, torch.bfloat16):
            for _ in range(count):
                logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    finally:
        model.set_attn_implementation(was)
    return torch.cat(tokens, 1)


def repeated(tokens: Tensor, gram: int, end: int | None) -> Tensor:
    """Where a run of `gram` tokens ends that was there before in the same sequence.

    Args:
        tokens: int64 [B, N].
        end: a token behind which a sequence is over: nothing of it and behind it counts. None if there is none.

    Returns:
        bool [B, N].
    """
    if tokens.shape[1] < gram:
        return torch.zeros_like(tokens, dtype=torch.bool)
    runs = tokens.unfold(1, gram, 1)  # [B, N - gram + 1, gram]
    equal = (runs[:, :, None] == runs[:, None]).all(-1).tril(-1)
    found = F.pad(equal.any(-1), (gram - 1, 0))
    return found if end is None else found & ((tokens == end).cumsum(1) == 0)


def ended_early(tokens: Tensor, end: int | None) -> Tensor:
    """Where sequences end before they have SHORTEST tokens. int64 [B, N] to bool [B, N]."""
    ends = tokens == (-1 if end is None else end)
    ends[:, SHORTEST:] = False
    return ends & (ends.cumsum(1) == 1)


def unlikelihood(model: LlamaForCausalLM, tokens: Tensor, unwanted: Tensor) -> Tensor:
    """-log(1 - p) of the unwanted ones among the last tokens of sequences, per token looked at; a scalar.

    Args:
        tokens: int64 [B, P + N].
        unwanted: bool [B, N].
    """
    count = unwanted.shape[1]
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, -count:]
        logits = model.lm_head(hidden[unwanted])
    chances = logits.float().softmax(-1).gather(1, tokens[:, -count:][unwanted][:, None])
    return -torch.log1p(-chances.clamp(max=SUREST)).sum() / unwanted.numel()
