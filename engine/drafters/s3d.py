"""Self-speculative decoding by skipped layers and mask tokens (S3D, arXiv 2405.20314).

The model drafts for itself. One pass through the layers outside the skip band, over the
newest token and some masks, gives a token per row. Its rows read the verifier's own KV of
everything before, and write theirs into the lookahead slots, where the verify pass of the
same step will overwrite them: the drafter has no memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.chain import Prospect, draft_chain
from skippy.engine.model import skipping_plan
from skippy.engine.runner import Rows, Runner
from skippy.engine.sampling import SamplingState
from skippy.engine.sequence import Sequence
from skippy.engine.tensors import to_device


class S3DDrafter:
    """Drafts with the model of a runner and an adapter trained for it.

    Args:
        states: how each live sequence chooses its tokens.
    """

    name = "s3d"

    def __init__(self, runner: Runner, adapter: S3DAdapter, states: Mapping[Sequence, SamplingState]) -> None:
        config = adapter.config
        self.adapter = adapter
        self._runner = runner
        self._states = states
        self._plan = skipping_plan(runner.model.config, config.skip_start, config.skip_end)
        self._place: dict[Sequence, int] = {}
        self._context: Tensor | None = None  # [B, 2, hidden_size], of the sequences in _place

    @property
    def taps(self) -> SequenceOf[int]:
        return (self.adapter.config.skip_start, self.adapter.config.skip_end)

    def observe(self, sequences: SequenceOf[Sequence], hidden: Tensor, tapped: Mapping[int, Tensor]) -> None:
        start, end = self.taps
        self._context = torch.stack((tapped[end] - tapped[start], hidden), 1)
        self._place = {sequence: place for place, sequence in enumerate(sequences)}

    @torch.inference_mode()
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        most = self.adapter.config.num_speculative_tokens
        # A step that failed half-way showed nothing of the sequences that it served.
        known = [place for place, s in enumerate(sequences) if s in self._place]
        proposals: list[list[int]] = [[] for _ in sequences]
        if known:
            widths = [min(limits[place], most) for place in known]
            drafts = self._draft([sequences[place] for place in known], widths)
            for place, width, draft in zip(known, widths, drafts.tolist(), strict=True):
                proposals[place] = draft[:width]
        return proposals

    def _draft(self, sequences: SequenceOf[Sequence], widths: list[int]) -> Tensor:
        """[B, widest] int64; what is beyond a sequence's width means nothing."""
        rows = [
            Rows([s.tokens[-1], *self.adapter.mask_ids(width - 1)], s.computed, s.table, width)
            for s, width in zip(sequences, widths, strict=True)
        ]
        device = self._runner.pool.keys.device
        assert self._context is not None
        of_row = [self._place[s] for s, width in zip(sequences, widths, strict=True) for _ in range(width)]
        context = self._context[to_device(of_row, device)]
        hidden, _ = self._runner.compute(rows, self._plan, self.adapter.bind(context))
        return draft_chain(
            self._runner.model,
            self.adapter,
            _by_sequence(hidden, widths),
            to_device([s.tokens[-1] for s in sequences], device),
            [Prospect(self._states[s], len(s.tokens)) for s in sequences],
        )


def _by_sequence(hidden: Tensor, widths: SequenceOf[int]) -> Tensor:
    """Rows [sum of widths, H] to [B, widest, H]; what is beyond a sequence's width is zero."""
    widest = max(widths)
    if min(widths) == widest:
        return hidden.view(len(widths), widest, -1)
    out = hidden.new_zeros(len(widths) * widest, hidden.shape[1])
    places = [i * widest + row for i, width in enumerate(widths) for row in range(width)]
    out[to_device(places, hidden.device)] = hidden
    return out.view(len(widths), widest, -1)
