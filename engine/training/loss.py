"""How far the drafter is from the model it has to foresee.

The vocabulary is what makes this dear: neither logits nor their gradients are ever kept
for more than a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOP = 64
"""The teacher's likeliest tokens, which the loss looks at. The rest is a per cent or two of the mass."""
CHUNK = 2**22
"""Logits computed at a time."""
LEAST_ROWS = 256
"""Rows computed at a time at least: with fewer, a GPU would wait for the head's weights."""

Head = Callable[[Tensor], Tensor]
"""[R, hidden_size] to [R, V], in whatever way the weights are kept; differentiable."""


@torch.no_grad()
def teacher_tops(normed: Tensor, head: Head, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of every row: ids [R, TOP] int64 and probabilities [R, TOP] float32.

    Args:
        normed: [R, hidden_size], last hidden states behind the model's final norm.
        rows_at_once: logits of no more rows are there at a time.
    """
    tops = [_tops(head(rows)) for rows in torch.split(normed, rows_at_once)]
    return torch.cat([ids for ids, _ in tops]), torch.cat([probs for _, probs in tops])


def draft_loss(normed: Tensor, head: Head, ids: Tensor, probs: Tensor, tv_share: float, rows_at_once: int) -> Tensor:
    """tv_share * TV + (1 - tv_share) * KL of every row, [R] float32. Only `normed` gets a gradient.

    With noise shared between drafter and verifier, or by rejection sampling, a drafted token
    is accepted with a probability of about 1 - TV (arXiv 2211.17192, section 3.5), so TV is
    what counts, and KL is what learns from scratch. Both over the teacher's likeliest tokens.

    Args:
        normed: [R, hidden_size], the drafter's hidden states behind the model's final norm.
        ids, probs: of the teacher, see `teacher_tops`.
        rows_at_once: logits and their gradient of no more rows are there at a time.
    """
    loss: Tensor = _DraftLoss.apply(normed, head, ids, probs, tv_share, rows_at_once)  # type: ignore[no-untyped-call]
    return loss


def rows_of_vocabulary(vocab_size: int) -> int:
    """How many rows of logits to have at a time."""
    return max(LEAST_ROWS, CHUNK // vocab_size)


def _tops(logits: Tensor) -> tuple[Tensor, Tensor]:
    probs, ids = logits.softmax(-1, dtype=torch.float32).topk(min(TOP, logits.shape[-1]), dim=-1)
    return ids, probs


class _DraftLoss(torch.autograd.Function):
    """The loss and, at once, its gradient, while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, head: Head, ids: Tensor, probs: Tensor, tv_share: float, rows_at_once: int
    ) -> Tensor:
        parts = [torch.split(tensor, rows_at_once) for tensor in (normed, ids, probs)]
        done = [_loss_and_gradient(rows, i, p, head, tv_share) for rows, i, p in zip(*parts, strict=True)]
        ctx.save_for_backward(torch.cat([gradient for _, gradient in done]))
        return torch.cat([loss for loss, _ in done])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None, None, None


def _loss_and_gradient(rows: Tensor, ids: Tensor, p: Tensor, head: Head, tv_share: float) -> tuple[Tensor, Tensor]:
    """The loss of some rows, [R] float32, and its gradient by `rows`, [R, hidden_size].

    With q the drafter's distribution, p the teacher's on its likeliest tokens, P the sum of p,
    and M the sum of q over those of them where q < p, the derivatives by logit v are

        KL   P q_v - p_v
        TV   M q_v - q_v [q_v < p_v]

    where p_v and the bracket are 0 for tokens that are not among the teacher's likeliest. A
    softcap c multiplies them by the derivative of c tanh(x / c), which is 1 - (logit / c)^2.
    """
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        product = head(rows)
    logits = product.detach()
    q = logits.softmax(-1, dtype=torch.float32)
    largest = logits.max(-1, keepdim=True)
    # The normaliser by way of the largest: log q itself may be that of 0.
    normaliser = largest.values.float() - q.gather(1, largest.indices).log()
    log_q_top, q_top = logits.gather(1, ids).float() - normaliser, q.gather(1, ids)
    short = q_top * (q_top < p)
    kl = (p * (p.clamp(min=1e-9).log() - log_q_top)).sum(-1)
    tv = (p - torch.minimum(p, q_top)).sum(-1)
    q *= tv_share * short.sum(-1, keepdim=True) + (1.0 - tv_share) * p.sum(-1, keepdim=True)
    q.scatter_add_(1, ids, -(tv_share * short + (1.0 - tv_share) * p))
    (gradient,) = torch.autograd.grad(product, rows, q.to(product.dtype))
    return tv_share * tv + (1.0 - tv_share) * kl, gradient
