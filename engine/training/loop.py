"""The training loop of the adapter. The base stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.chain import Prospect, draft_chain
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState
from skippy.engine.training.loss import draft_loss, teacher_tops
from skippy.engine.training.passes import Teaching, draft_rows, teach
from skippy.engine.types import SamplingParams

DEPTH_DECAY = 0.9
"""A row counts this much less than the one before it: it matters only if that one is accepted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A training text: `tokens[start:]` was chosen by the model at `temperature` under `seed`."""

    tokens: list[int]
    start: int
    temperature: float
    seed: int


def step_loss(
    model: CausalLM, adapter: S3DAdapter, samples: Sequence[Sample], anchors: int, tv_share: float,
    generator: torch.Generator, sharpen: float = 1.0, aux: float = 0.0,
) -> Tensor:
    """The loss of one batch, a scalar. All samples are of one length."""
    tokens = torch.tensor([s.tokens for s in samples])
    batch, length = tokens.shape
    width = adapter.config.num_speculative_tokens
    teaching = teach(model, adapter, tokens)
    # Distinct places, so that no row is computed twice.
    places = torch.rand(batch, length - width - 1, generator=generator).topk(anchors, dim=1).indices + 1
    hidden = draft_rows(model, adapter, teaching, places)
    temperature = torch.tensor([sharpen if s.temperature == 0.0 else 1.0 for s in samples])
    temperature = temperature.repeat_interleave(anchors * width)
    ahead = (places[:, :, None] + torch.arange(width)).flatten(1)  # [B, A * G]: row j follows this place
    with torch.no_grad():
        rows = teaching.hidden.gather(1, ahead[:, :, None].expand(-1, -1, teaching.hidden.shape[-1]))
        ids, probs = teacher_tops(head_logits(model, rows.flatten(0, 1)), temperature)
    previous = tokens.gather(1, ahead).view(-1, width)
    flat = hidden.flatten(0, 1)
    loss = draft_loss(head_logits(model, corrected_rows(model, adapter, flat, previous).flatten(0, 1)),
                      ids, probs, temperature, tv_share)
    if aux and adapter.head is not None:
        loss = loss + aux * draft_loss(head_logits(model, flat.flatten(0, 1)), ids, probs, temperature, 0.0)
    weights = DEPTH_DECAY ** torch.arange(width)
    return (loss.view(-1, width) * weights).sum(1).mean() / weights.sum()


def corrected_rows(model: CausalLM, adapter: S3DAdapter, hidden: Tensor, previous: Tensor) -> Tensor:
    """Hidden states behind the sequential head, given the token before each row.

    hidden [N, G, hidden_size], previous [N, G] int64.
    """
    if adapter.head is None:
        return hidden
    prepared = adapter.head.prepare(hidden)
    embedded = model.model.embed_tokens(previous)
    state: Tensor | None = None
    rows = []
    for row in range(hidden.shape[1]):
        state = adapter.head.step(prepared[:, row], embedded[:, row], state)
        rows.append(adapter.head.correct(hidden[:, row], state))
    return torch.stack(rows, 1)


def head_logits(model: CausalLM, hidden: Tensor) -> Tensor:
    """[R, hidden_size] to [R, V] in the model's dtype."""
    return torch.nn.functional.linear(model.model.norm(hidden), model.lm_head.weight)


@torch.no_grad()
def walk(model: CausalLM, adapter: S3DAdapter, samples: Sequence[Sample]) -> dict[str, object]:
    """Tokens per step if `samples` were decoded with the adapter, as the engine would count them.

    What is accepted depends only on the text before a newest token, and that text is known:
    so the drafts at all places are computed at once, and then walked along.
    """
    emitted = steps = 0
    depth = [0] * adapter.config.num_speculative_tokens
    width = adapter.config.num_speculative_tokens
    for sample in samples:
        tokens = torch.tensor([sample.tokens])
        anchors = torch.arange(sample.start, len(sample.tokens) - width - 1)[None]
        hidden = draft_rows(model, adapter, teach(model, adapter, tokens), anchors)[0]
        params = SamplingParams(max_tokens=len(sample.tokens), temperature=sample.temperature, seed=sample.seed)
        state = SamplingState(params, sample.tokens[: sample.start], sample.seed, 0, (), model.config.vocab_size,
                              torch.device("cpu"))
        prospects = [Prospect(state, n + 1) for n in anchors[0].tolist()]
        drafts = draft_chain(model, adapter, hidden, tokens[0, anchors[0]], prospects).tolist()
        place = sample.start
        while place < sample.start + len(drafts):
            draft = drafts[place - sample.start]
            accepted = 0
            while accepted < width and draft[accepted] == sample.tokens[place + 1 + accepted]:
                depth[accepted] += 1
                accepted += 1
            place += accepted + 1
            emitted += accepted + 1
            steps += 1
    return {"tokens_per_step": emitted / steps, "by_depth": [round(d / steps, 3) for d in depth]}
