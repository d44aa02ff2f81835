"""How far the drafter is from the model it has to foresee."""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 64
"""The teacher's likeliest tokens, which the loss looks at. The rest is a per cent or two of the mass."""


def teacher_tops(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of every row: ids [R, TOP] int64 and probabilities [R, TOP] float32.

    logits [R, V]; temperature [R].
    """
    scaled = logits.float() / temperature[:, None]
    best, ids = scaled.topk(min(TOP, logits.shape[-1]), dim=-1)
    return ids, (best - scaled.logsumexp(-1, keepdim=True)).exp()


def draft_loss(logits: Tensor, ids: Tensor, probs: Tensor, temperature: Tensor, tv_share: float) -> Tensor:
    """tv_share * TV + (1 - tv_share) * KL of every row, [R] float32.

    With noise shared between drafter and verifier, or by rejection sampling, a drafted token
    is accepted with a probability of about 1 - TV (arXiv 2211.17192, section 3.5), so TV is
    what counts, and KL is what learns from scratch. Both over the teacher's likeliest tokens.

    Args:
        logits: [R, V], the drafter's.
        ids, probs: of the teacher, see `teacher_tops`.
        temperature: [R], applied to both sides.
    """
    scaled = logits.float() / temperature[:, None]
    log_q = scaled.gather(1, ids) - scaled.logsumexp(-1, keepdim=True)
    kl = (probs * (probs.clamp(min=1e-9).log() - log_q)).sum(-1)
    if tv_share == 0.0:
        return kl
    tv = probs.sum(-1) - torch.minimum(probs, log_q.exp()).sum(-1)
    return tv_share * tv + (1.0 - tv_share) * kl
