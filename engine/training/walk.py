"""Tokens per step along a text, without decoding it.

What is accepted depends only on the text before a newest token, and that text is known:
so the drafts at many places are computed at once, and then walked along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from skippy.engine.adapter import S3DAdapter
from skippy.engine.chain import Prospect, draft_chain
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState
from skippy.engine.training.data import Sample
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.types import SamplingParams

PLACES = 64
"""Drafted from at a time."""


@dataclass(frozen=True, slots=True)
class Walk:
    """How some texts would be decoded.

    Attributes:
        tokens_per_step: along the decode, the verifier's own token included.
        by_depth: entry j is the share of the steps that accepted more than j drafted tokens.
    """

    tokens_per_step: float
    by_depth: list[float]


def walk(model: CausalLM, adapter: S3DAdapter, samples: Sequence[Sample]) -> Walk:
    """Tokens per step if `samples` were decoded with the adapter, as the engine would count them."""
    device = model.model.embed_tokens.weight.device
    accepted: list[int] = []
    for sample in samples:
        params = SamplingParams(temperature=sample.temperature, seed=sample.seed)
        prompt, size = sample.tokens[: sample.start], model.lm_head.out_features
        state = SamplingState(params, prompt, sample.seed, 0, (), size, device)
        accepted += accepted_counts(model, adapter, sample.tokens, sample.start, state)
    steps = max(1, len(accepted))
    return Walk(
        tokens_per_step=sum(accepted) / steps + 1,
        by_depth=[
            sum(count > depth for count in accepted) / steps for depth in range(adapter.config.num_speculative_tokens)
        ],
    )


@torch.no_grad()
def accepted_counts(
    model: CausalLM,
    adapter: S3DAdapter,
    tokens: Sequence[int],
    start: int,
    state: SamplingState,
    *,
    places: int = PLACES,
    cut: int = 0,
) -> Iterator[int]:
    """How many drafted tokens each step of a decode accepts, while the text goes on beyond its draft.

    Args:
        start: where the decode begins.
        state: how the text's tokens were chosen.
        places: drafted from at a time.
        cut: how many tokens of the text went before the first one.
    """
    width = adapter.config.num_speculative_tokens
    text = torch.tensor([tokens], device=model.model.embed_tokens.weight.device)
    teaching = teach(model, adapter, text)
    place, end = start, len(tokens) - width
    while place < end:
        anchors = torch.arange(place, min(place + places, end), device=text.device)[None]
        hidden = draft_rows(model, adapter, teaching, anchors)[0]
        prospects = [Prospect(state, cut + anchor + 1) for anchor in anchors[0].tolist()]
        drafts = draft_chain(model, adapter, list(hidden), text[0, anchors[0]], prospects, [[1.0]] * len(hidden))
        first = place
        while place - first < len(drafts):
            following = tokens[place + 1 : place + 1 + width]
            agreeing = (link.token == token for link, token in zip(drafts[place - first], following, strict=True))
            accepted = sum(takewhile(bool, agreeing))
            yield accepted
            place += accepted + 1
