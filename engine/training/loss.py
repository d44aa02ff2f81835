"""How far the drafter is from the model it has to foresee.

The vocabulary is what makes this dear: neither logits nor their gradients are ever kept
for more than a few rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.model import softcapped

TOP = 64
"""The teacher's likeliest tokens, which the loss looks at. The rest is a per cent or two of the mass."""
CHUNK = 2**22
"""Logits computed at a time, at most."""


@torch.no_grad()
def teacher_tops(normed: Tensor, head: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of every row: ids [R, TOP] int64 and probabilities [R, TOP] float32.

    Args:
        normed: [R, hidden_size], last hidden states behind the model's final norm.
        head: [V, hidden_size].
        softcap: of the logits.
    """
    tops = [
        softcapped(F.linear(rows, head), softcap).softmax(-1, dtype=torch.float32).topk(min(TOP, len(head)), dim=-1)
        for rows in torch.split(normed, _rows_at_once(head))
    ]
    return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])


def draft_loss(
    normed: Tensor, head: Tensor, ids: Tensor, probs: Tensor, tv_share: float, softcap: float | None = None
) -> Tensor:
    """tv_share * TV + (1 - tv_share) * KL of every row, [R] float32. Only `normed` gets a gradient.

    With noise shared between drafter and verifier, or by rejection sampling, a drafted token
    is accepted with a probability of about 1 - TV (arXiv 2211.17192, section 3.5), so TV is
    what counts, and KL is what learns from scratch. Both over the teacher's likeliest tokens.

    Args:
        normed: [R, hidden_size], the drafter's hidden states behind the model's final norm.
        head: [V, hidden_size].
        ids, probs: of the teacher, see `teacher_tops`.
        softcap: of the logits.
    """
    loss: Tensor = _DraftLoss.apply(normed, head, ids, probs, tv_share, softcap)  # type: ignore[no-untyped-call]
    return loss


class _DraftLoss(torch.autograd.Function):
    """The loss and, at once, its gradient, while the logits are at hand.

    With q the drafter's distribution, p the teacher's on its likeliest tokens, P the sum of p,
    and M the sum of q over those of them where q < p, the derivatives by logit v are

        KL   P q_v - p_v
        TV   M q_v - q_v [q_v < p_v]

    where p_v and the bracket are 0 for tokens that are not among the teacher's likeliest. A
    softcap c multiplies them by the derivative of c tanh(x / c), which is 1 - (logit / c)^2.
    """

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, head: Tensor, ids: Tensor, probs: Tensor, tv_share: float, softcap: float | None
    ) -> Tensor:
        losses, gradients = [], []
        chunks = [torch.split(tensor, _rows_at_once(head)) for tensor in (normed, ids, probs)]
        for rows, i, p in zip(*chunks, strict=True):
            logits = softcapped(F.linear(rows, head), softcap)
            q = logits.softmax(-1, dtype=torch.float32)
            largest = logits.max(-1, keepdim=True)
            # The normaliser by way of the largest: log q itself may be that of 0.
            normaliser = largest.values.float() - q.gather(1, largest.indices).log()
            log_q_top, q_top = logits.gather(1, i).float() - normaliser, q.gather(1, i)
            short = q_top * (q_top < p)
            kl = (p * (p.clamp(min=1e-9).log() - log_q_top)).sum(-1)
            tv = (p - torch.minimum(p, q_top)).sum(-1)
            losses.append(tv_share * tv + (1.0 - tv_share) * kl)
            if ctx.needs_input_grad[0]:
                q *= tv_share * short.sum(-1, keepdim=True) + (1.0 - tv_share) * p.sum(-1, keepdim=True)
                q.scatter_add_(1, i, -(tv_share * short + (1.0 - tv_share) * p))
                if softcap is not None:
                    q *= 1.0 - (logits / softcap).square()
                gradients.append(q.to(head.dtype) @ head)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None, None, None


def _rows_at_once(head: Tensor) -> int:
    return max(1, CHUNK // len(head))
