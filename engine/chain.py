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
    best, ids, altered = _candidates(model, hidden.reshape(-1, size), prospects)
    best, ids = best.view(batch, width, -1), ids.view(batch, width, -1)
    choice = _Choice(ids, prospects)
    if adapter.head is None:
        return torch.stack([choice.pick(row, best[:, row]) for row in range(width)], 1)
    rescore = _Rescorer(model, ids, None if altered is None else altered.view_as(ids), choice)
    state: Tensor | None = None
    token, drafted = newest, []
    for row, (prepared, uncorrected) in enumerate(
        zip(adapter.head.prepare(hidden).unbind(1), hidden.unbind(1), strict=True)
    ):
        state = adapter.head.step(prepared, model.embed(token), model.embedding_scale, state)
        token = choice.pick(row, rescore(row, adapter.head.correct(uncorrected, state)))
        drafted.append(token)
    return torch.stack(drafted, 1)


def _candidates(model: CausalLM, hidden: Tensor, prospects: Sequence[Prospect]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The likeliest tokens of every row: logits, ids and what penalties, bias and bans added to the logits.

    hidden [B * G, hidden_size] to [B * G, K] each; None where nothing is added.
    """
    if not any(p.state.alters for p in prospects):
        logits, of_column = model.draft_logits(hidden)
        best, columns = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
        return best, columns if of_column is None else of_column[columns], None
    raw = model.logits(hidden)
    logits = raw.clone()
    for p, rows in zip(prospects, logits.chunk(len(prospects)), strict=True):
        if p.state.alters:
            p.state.alter(rows, (), p.index)
    best, ids = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
    return best, ids, best - raw.gather(-1, ids)


class _Rescorer:
    """Logits of the candidates alone, or where only their order counts, something proportional to them.

    Args:
        ids: the candidates, [B, G, K].
        altered: what penalties and the like added to their logits, [B, G, K], or None.
    """

    def __init__(self, model: CausalLM, ids: Tensor, altered: Tensor | None, choice: _Choice) -> None:
        norm = model.model.norm
        # norm(x) . w = x . (weight * w) / rms(x): the weight goes over to the candidates' side once.
        self._rows = (model.head_rows(ids) * norm.weight).unbind(1)
        self._eps = norm.eps
        self._altered = altered
        self._only_order = altered is None and choice.greedy

    def __call__(self, row: int, hidden: Tensor) -> Tensor:
        """hidden [B, hidden_size], of row `row`, to [B, K] float32."""
        scores = torch.bmm(self._rows[row], hidden[:, :, None]).squeeze(-1)
        if self._only_order:
            return scores
        square = torch.linalg.vecdot(hidden, hidden)[:, None].float()
        scores = scores.float() * torch.rsqrt(square / hidden.shape[-1] + self._eps)
        return scores if self._altered is None else scores + self._altered[:, row]


class _Choice:
    """Chooses among candidates as `sampling.choose` will among all tokens.

    Args:
        ids: the candidates, [B, G, K].
    """

    def __init__(self, ids: Tensor, prospects: Sequence[Prospect]) -> None:
        self._ids = ids.unbind(1)
        self._params = [p.state.params for p in prospects]
        self.greedy = all(p.greedy for p in self._params)
        if self.greedy:
            return
        device, width = ids.device, ids.shape[1]
        keys = [fold(p.state.key(p.index + row)) for p in prospects for row in range(width)]
        folded = to_device(keys, device).int().view(len(prospects), width, 1)
        noise = exponential(noise_bits(folded, ids.int())).log().float()
        greedy = torch.tensor([p.greedy for p in self._params], device=device)
        self._log_noise = noise.masked_fill_(greedy[:, None, None], 0.0).unbind(1)
        self._temperature = torch.tensor(
            [1.0 if p.greedy else p.temperature for p in self._params], dtype=torch.float32, device=device
        )[:, None]
        self._truncates = any(p.top_k or p.top_p < 1.0 or p.min_p for p in self._params)

    def pick(self, row: int, scores: Tensor) -> Tensor:
        """scores [B, K] of row `row`'s candidates to the tokens chosen, [B]."""
        if not self.greedy:
            scores = scores / self._temperature
            if self._truncates and (keep := survivors(scores.softmax(-1), self._params)) is not None:
                scores = scores.masked_fill(~keep, float("-inf"))
            scores = scores - self._log_noise[row]
        return self._ids[row].gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)
