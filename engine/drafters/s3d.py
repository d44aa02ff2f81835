"""Self-speculative decoding by skipped layers and mask tokens (S3D, arXiv 2405.20314).

The model drafts for itself, in one of two ways, which the adapter decides:

    separate  One pass through the layers outside the skip band, over the newest token and
              some masks. Its rows read the verifier's own KV of everything before, and
              write theirs into the lookahead slots, where the verify pass of the same step
              will overwrite them: the drafter has no memory of its own.
    fused     No pass at all: behind each verify row that chooses a token ride masks that
              stand for that token and those after it. What the riders of the last accepted
              row came to is the next draft, less the sequential head, which needs the token
              chosen. One pass per step, of more rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from itertools import takewhile

import torch
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.chain import Prospect, draft_chain
from skippy.engine.drafters.base import Followed
from skippy.engine.drafters.calibration import ConfidenceCalibration
from skippy.engine.runner import Rows, Runner
from skippy.engine.sampling import SamplingState
from skippy.engine.sequence import Sequence
from skippy.engine.shape import skipping_plan
from skippy.engine.tensors import to_device

MIN_REACH = 0.05
"""A token must be accepted so often to be worth verifying: less than a row costs on a small processor, for on a larger
one rows are free (RESULTS.md)."""


class _S3D:
    """Drafts with the model of a runner and an adapter trained for it.

    Args:
        states: how each live sequence chooses its tokens.
    """

    name = "s3d"

    def __init__(self, runner: Runner, adapter: S3DAdapter, states: Mapping[Sequence, SamplingState]) -> None:
        self.adapter = adapter
        self._runner = runner
        self._states = states
        self._calibration = ConfidenceCalibration()

    def release(self, sequence: Sequence) -> None:
        self._calibration.settle(sequence)

    def forget(self) -> None:
        self._calibration = ConfidenceCalibration()

    def _chains(self, sequences: SequenceOf[Sequence], hidden: SequenceOf[Tensor]) -> list[list[int]]:
        """At most a token per draft row. hidden [rows, hidden_size] of each sequence; some may have no rows."""
        for sequence in sequences:
            self._calibration.settle(sequence)
        greedy = [self._states[s].params.greedy for s in sequences]
        chances = {kind: self._calibration.chances(greedy=kind) for kind in set(greedy)}
        chains = draft_chain(
            self._runner.model,
            self.adapter,
            hidden,
            to_device([s.tokens[-1] for s in sequences], hidden[0].device),
            [Prospect(self._states[s], len(s.tokens)) for s in sequences],
            [chances[kind] for kind in greedy],
            MIN_REACH,
        )
        drafts = []
        for sequence, kind, chain in zip(sequences, greedy, chains, strict=True):
            self._calibration.note_levels(sequence, ((link.token, link.level) for link in chain), greedy=kind)
            drafts.append([link.token for link in takewhile(lambda link: link.reach >= MIN_REACH, chain)])
        return drafts


class S3DDrafter(_S3D):
    """The separate kind."""

    def __init__(self, runner: Runner, adapter: S3DAdapter, states: Mapping[Sequence, SamplingState]) -> None:
        super().__init__(runner, adapter, states)
        config = adapter.config
        self._plan = skipping_plan(runner.model.config, config.skip_start, config.skip_end)
        self._place: dict[Sequence, int] = {}
        self._context: Tensor | None = None  # [B, 2, hidden_size], of the sequences in _place

    @property
    def taps(self) -> SequenceOf[int]:
        config = self.adapter.config
        return (config.skip_start, config.skip_end, self._runner.model.config.num_hidden_layers)

    def follow(self, parts: SequenceOf[Followed], tapped: Mapping[int, Tensor]) -> None:
        start, end, last = (tapped[layer] for layer in self.taps)
        newest = to_device([part.row + part.num_rows - 1 for part in parts], last.device)
        self._context = torch.stack((end[newest] - start[newest], last[newest]), 1)
        self._place = {part.sequence: place for place, part in enumerate(parts)}

    @torch.inference_mode()
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        most = self.adapter.config.num_speculative_tokens
        # What a step that failed half-way did not show is missing or a step old: a worse draft, no more.
        widths = [min(n, most) if s in self._place else 0 for s, n in zip(sequences, limits, strict=True)]
        return self._draft(sequences, widths) if any(widths) else [[] for _ in sequences]

    def _draft(self, sequences: SequenceOf[Sequence], widths: list[int]) -> list[list[int]]:
        drafting = [(s, width) for s, width in zip(sequences, widths, strict=True) if width]
        rows = [Rows([s.tokens[-1], *self.adapter.mask_ids(n - 1)], s.computed, s.table, n) for s, n in drafting]
        assert self._context is not None
        places = to_device([self._place[s] for s, n in drafting for _ in range(n)], self._context.device)
        bound = self.adapter.bind(self._context, draft_of_row=places)
        computed = self._runner.compute(rows, self._plan, bound)
        return self._chains(sequences, torch.split(computed.hidden, widths))


class S3DFusedDrafter(_S3D):
    """The fused kind."""

    def __init__(self, runner: Runner, adapter: S3DAdapter, states: Mapping[Sequence, SamplingState]) -> None:
        super().__init__(runner, adapter, states)
        self._riders: Mapping[Sequence, Tensor] = {}
        self._nobody = adapter.masks.new_empty(0, runner.model.config.hidden_size)

    def collect(self, riders: Mapping[Sequence, Tensor]) -> None:
        """What the last pass made of the riders behind each sequence's newest computed token.

        [riders, hidden_size] each, the last hidden states, not normalised; no rows if none rode.
        """
        self._riders = riders

    @torch.inference_mode()
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        # What a step that failed half-way did not show is missing or a step old: a worse draft, no more.
        riders = [self._riders.get(s, self._nobody)[:limit] for s, limit in zip(sequences, limits, strict=True)]
        return self._chains(sequences, riders) if any(map(len, riders)) else [[] for _ in sequences]
