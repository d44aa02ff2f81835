"""EAGLE-3 (arXiv 2503.01840): a small decoder layer of its own drafts from the verifier's hidden states.

It has a cache of its own, of one layer, in blocks of the same numbers as the verifier's. So
prefixes are shared, and preempted sequences recomputed, as they are there, and a draft's
slots are overwritten by what was verified. What a sequence of another drafter computed is
missing in a shared prefix: a worse draft, no more.

Drafts are chains. Trees, as the paper has them, are not verified here.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skippy.engine.chain import Choice, Prospect, Scored, level_of
from skippy.engine.drafters.base import Followed
from skippy.engine.drafters.calibration import LEVELS, ConfidenceCalibration
from skippy.engine.eagle import EagleHead
from skippy.engine.model import CausalLM
from skippy.engine.runner import Rows, Runner
from skippy.engine.sampling import SamplingState
from skippy.engine.sequence import Sequence

MIN_REACH = 0.05
"""As of S3D, and not measured for a head: a token must be accepted so often to be worth verifying."""
MAX_DRAFT = 8


class _Inputs(NamedTuple):
    """A run of rows of one sequence: the tokens behind its positions, and the states at them."""

    sequence: Sequence
    tokens: list[int]
    position: int
    states: Tensor  # [len(tokens), hidden_size], see `EagleHead.forward`


@dataclass(slots=True)
class _Draft:
    """A draft that grows.

    Args:
        chances: that a token of each level of confidence is right.
    """

    greedy: bool
    chances: SequenceOf[float]
    tokens: list[int] = field(default_factory=list)
    guesses: list[tuple[int, int]] = field(default_factory=list)
    """With their levels: the tokens, and what was not worth to be one."""
    reach: float = 1.0

    def extend(self, token: int, level: int) -> None:
        """By a token, if it will be reached often enough."""
        self.guesses.append((token, level))
        self.reach *= self.chances[level]
        if self.reach >= MIN_REACH:
            self.tokens.append(token)


class Eagle3Drafter:
    """Drafts with a published head.

    Args:
        model: the verifier, for its embeddings if the head has none.
        cache: lays out rows over the head's pool, and attends in it.
        states: how each live sequence chooses its tokens.
    """

    name = "eagle3"

    def __init__(
        self, head: EagleHead, model: CausalLM, cache: Runner, states: Mapping[Sequence, SamplingState]
    ) -> None:
        self._head = head
        self._embed = head.embed_tokens or model.embed
        self._cache = cache
        self._states = states
        self._calibration = ConfidenceCalibration()
        self._last: dict[Sequence, Tensor] = {}
        """[hidden_size], what the head made of each sequence's newest computed token."""

    @property
    def taps(self) -> SequenceOf[int]:
        return self._head.config.taps

    def release(self, sequence: Sequence) -> None:
        self._calibration.settle(sequence)

    def forget(self) -> None:
        self._calibration = ConfidenceCalibration()

    @torch.inference_mode()
    def follow(self, parts: SequenceOf[Followed], tapped: Mapping[int, Tensor]) -> None:
        rows = [slice(part.row, part.row + part.num_rows) for part in parts]
        states = torch.cat([torch.cat([tapped[layer][own] for own in rows]) for layer in self.taps], -1)
        sizes = [part.num_rows for part in parts]
        inputs = [
            _Inputs(part.sequence, part.sequence.tokens[first : first + part.num_rows], part.position, own)
            for part, own in zip(parts, torch.split(self._head.fc(states), sizes), strict=True)
            for first in [part.position + 1]
        ]
        outputs = torch.split(self._compute(inputs), sizes)
        self._last = {part.sequence: output[-1] for part, output in zip(parts, outputs, strict=True)}

    @torch.inference_mode()
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        # What a step that failed half-way did not show is missing or a step old: a worse draft, no more.
        widths = [min(n, MAX_DRAFT) if s in self._last else 0 for s, n in zip(sequences, limits, strict=True)]
        drafting = [(s, width) for s, width in zip(sequences, widths, strict=True) if width]
        drafts = iter(self._draft(drafting) if drafting else [])
        return [next(drafts) if width else [] for width in widths]

    def _draft(self, drafting: SequenceOf[tuple[Sequence, int]]) -> list[list[int]]:
        hidden = torch.stack([self._last[s] for s, _ in drafting])
        most = max(width for _, width in drafting)
        choose = Choice([Prospect(self._states[s], len(s.tokens)) for s, _ in drafting], most, hidden.device)
        drafts = [self._begin(sequence) for sequence, _ in drafting]
        going = list(range(len(drafting)))
        for depth in range(most):
            logits, ids = self._head.logits(hidden)
            token, share = choose(depth, Scored(logits, ids.expand_as(logits)))
            tokens, levels = token.tolist(), [level_of(one, LEVELS) for one in share.tolist()]
            for place in going:
                drafts[place].extend(tokens[place], levels[place])
            going = [i for i in going if len(drafts[i].tokens) == depth + 1 < drafting[i][1]]
            if not going:
                break
            inputs = [
                _Inputs(s, tokens[i : i + 1], s.computed + depth, hidden[i : i + 1])
                for i, s in ((i, drafting[i][0]) for i in going)
            ]
            hidden[going] = self._compute(inputs)
        for (sequence, _), draft in zip(drafting, drafts, strict=True):
            self._calibration.note_levels(sequence, draft.guesses, greedy=draft.greedy)
        return [draft.tokens for draft in drafts]

    def _begin(self, sequence: Sequence) -> _Draft:
        self._calibration.settle(sequence)
        greedy = self._states[sequence].params.greedy
        return _Draft(greedy, self._calibration.chances(greedy=greedy))

    def _compute(self, inputs: SequenceOf[_Inputs]) -> Tensor:
        """All rows, in order, [N, hidden_size]; their keys and values are cached."""
        batch = self._cache.batch([Rows(i.tokens, i.position, i.sequence.table, 0) for i in inputs])
        states = torch.cat([i.states for i in inputs])
        count = len(states)
        states = F.pad(states, (0, 0, 0, len(batch.token_ids) - count))
        attend = self._cache.attend(batch, first_draft=0)
        out: Tensor = self._head(self._embed(batch.token_ids), states, batch.positions, attend)
        return out[:count]
