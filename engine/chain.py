"""From the rows of a draft pass to a chain of tokens.

The rows' hidden states meet the model's head once, all together, which leaves a few
candidates per row. Then the adapter's sequential head goes over the rows in order, and
rescores the candidates of each in the light of the token drafted before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState, exponential, fold, noise_bits, survivors
from skippy.engine.tensors import to_device

NUM_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class Prospect:
    """A sequence whose next tokens are drafted: how they will be chosen, and the index of the first."""

    state: SamplingState
    index: int


def draft_chain(
    model: CausalLM, adapter: S3DAdapter, hidden: Tensor, newest: Tensor, prospects: Sequence[Prospect]
) -> Tensor:
    """The drafted tokens, [B, G] int64.

    The verifier's choice is foreseen with the same noise, penalties, bias and bans; only
    what the drafted tokens themselves would change of the penalties is left out.

    Args:
        hidden: [B, G, hidden_size], the last hidden states of the draft rows, not normalised.
        newest: [B] int64, the token of each sequence's first row.
    """
    batch, width, size = hidden.shape
    logits = model.logits(hidden.reshape(-1, size)).view(batch, width, -1)
    raw = logits
    if any(p.state.alters for p in prospects):
        logits = logits.clone()
        for row, p in enumerate(prospects):
            if p.state.alters:
                p.state.alter(logits[row], (), p.index)
    best, ids = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
    pick = _Choice(ids, prospects)
    if adapter.head is None:
        return torch.stack([pick(row, best[:, row]) for row in range(width)], 1)
    altered = None if raw is logits else best - raw.gather(-1, ids)
    rows = model.head_rows(ids)  # [B, G, K, hidden_size]
    prepared = adapter.head.prepare(hidden)
    state: Tensor | None = None
    token, drafted = newest, []
    for row in range(width):
        state = adapter.head.step(prepared[:, row], model.model.embed_tokens(token), state)
        corrected = model.model.norm(adapter.head.correct(hidden[:, row], state))
        scores = (rows[:, row] @ corrected[:, :, None])[:, :, 0].float()
        token = pick(row, scores if altered is None else scores + altered[:, row])
        drafted.append(token)
    return torch.stack(drafted, 1)


class _Choice:
    """Chooses among candidates as `sampling.choose` will among all tokens."""

    def __init__(self, ids: Tensor, prospects: Sequence[Prospect]) -> None:
        self._ids = ids
        self._params = [p.state.params for p in prospects]
        self._log_noise: Tensor | None = None
        if all(p.greedy for p in self._params):
            return
        device, width = ids.device, ids.shape[1]
        keys = [fold(p.state.key(p.index + row)) for p in prospects for row in range(width)]
        folded = to_device(keys, device).int().view(len(prospects), width, 1)
        noise = exponential(noise_bits(folded, ids.int())).log().float()
        greedy = torch.tensor([p.greedy for p in self._params], device=device)
        self._log_noise = noise.masked_fill_(greedy[:, None, None], 0.0)
        self._temperature = torch.tensor(
            [1.0 if p.greedy else p.temperature for p in self._params], dtype=torch.float32, device=device
        )[:, None]

    def __call__(self, row: int, scores: Tensor) -> Tensor:
        """scores [B, K] of row `row`'s candidates to the tokens chosen, [B]."""
        if self._log_noise is not None:
            scores = scores / self._temperature
            keep = survivors(scores.softmax(-1), self._params)
            if keep is not None:
                scores = scores.masked_fill(~keep, float("-inf"))
            scores = scores - self._log_noise[:, row]
        place = scores.argmax(-1, keepdim=True)
        return self._ids[:, row].gather(1, place)[:, 0]
