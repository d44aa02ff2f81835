"""From the rows of a draft pass to a chain of tokens.

The adapter's sequential head goes over the rows in order and corrects the hidden state of
each in the light of the token drafted before it. The corrected state meets the model's head:
all of it while that is cheap, or where many sequences are drafted for at once; else of a
large vocabulary only a few candidates of each row, those that the rows' uncorrected states
find likeliest, in one product for all rows.

A token that will hardly be reached is not worth a row of the verify pass, so drafts end
where confidence does, as in EAGLE-2 (arXiv 2406.16858); what a confidence is worth is for
the caller to say. Once that is so of every sequence, the rest of the chain is spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skippy.engine.adapter import S3DAdapter
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState, exponential, fold, noise_bits, survivors
from skippy.engine.tensors import to_device

WHOLE_BELOW = 2**24
"""Weights of the draft vocabulary's head up to which every row of a draft reads them all."""
NUM_CANDIDATES = 512
"""Of each row. With 128 of the built-in model's 8,192 tokens a tenth of the tokens per step is lost (RESULTS.md)."""
NUM_SAMPLED = 64
"""Tokens among which a sampled draft is chosen; the rest of the mass is small."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A sequence whose next tokens are drafted: how they will be chosen, and the index of the first."""

    state: SamplingState
    index: int


class Link(NamedTuple):
    """A drafted token, the level of its confidence, and the chance that it and all before it are accepted."""

    token: int
    level: int
    reach: float


class Scored(NamedTuple):
    """Some tokens for each of B sequences, the likeliest ones at least."""

    logits: Tensor  # [B, K] float32
    ids: Tensor | None  # [B, K] int64; None where column v is token v


def draft_chain(
    model: CausalLM,
    adapter: S3DAdapter,
    hidden: Sequence[Tensor],
    newest: Tensor,
    prospects: Sequence[Prospect],
    chances: Sequence[Sequence[float]],
    min_reach: float = 0.0,
) -> list[list[Link]]:
    """The draft of each sequence: a token per row, or fewer where nobody's next can be reached often enough.

    The verifier's choice is foreseen with the same noise, penalties, bias and bans; only
    what the drafted tokens themselves would change of the penalties is left out.

    Args:
        hidden: [rows, hidden_size] of each of B sequences, the last hidden states of its draft rows,
            not normalised; some may have no rows.
        newest: [B] int64, the token of each sequence's first row.
        chances: of each sequence, how often its tokens are right, by the level of their
            confidence (see `level_of`).
        min_reach: drafts are of use up to the first token of a smaller reach.
    """
    padded = hidden[0][None] if len(hidden) == 1 else pad_sequence(list(hidden), batch_first=True)
    choose = Choice(prospects, padded.shape[1], padded.device)
    score = _scorer(model, adapter, padded)
    prepared = adapter.head.prepare(padded).unbind(1) if adapter.head else None
    token, state = newest, None
    chains: list[list[Link]] = [[] for _ in hidden]
    for row, uncorrected in enumerate(padded.unbind(1)):
        x = uncorrected
        if adapter.head is not None and prepared is not None:
            state = adapter.head.step(prepared[row], model.embed(token), model.embedding_scale, state)
            x = adapter.head.correct(uncorrected, state)
        token, confidence = choose(row, score(row, x))
        # A GPU is waited for here in every row, for the sake of those that need not be computed.
        for chain, by_level, drafted, share in zip(chains, chances, token.tolist(), confidence.tolist(), strict=True):
            level = level_of(share, len(by_level))
            chain.append(Link(drafted, level, (chain[-1].reach if chain else 1.0) * by_level[level]))
        if all(
            len(chain) >= len(rows) or chain[-1].reach < min_reach for chain, rows in zip(chains, hidden, strict=True)
        ):
            break
    return [chain[: len(rows)] for chain, rows in zip(chains, hidden, strict=True)]


def level_of(confidence: float, levels: int) -> int:
    """Which of so many equal parts of [0, 1] a confidence is in; the first if it is not a number."""
    return min(int(confidence * levels), levels - 1) if confidence > 0.0 else 0


def _scorer(model: CausalLM, adapter: S3DAdapter, hidden: Tensor) -> _WholeHead | _Candidates:
    draftable = model.config.vocab_size if adapter.draft_ids is None else len(adapter.draft_ids)
    batch, _, size = hidden.shape
    # Every sequence gathers rows for itself; together they should be no more than all that can be drafted.
    if adapter.head is None or draftable * size <= WHOLE_BELOW or batch * NUM_CANDIDATES > draftable:
        return _WholeHead(model)
    return _Candidates(model, hidden)


class _WholeHead:
    """The logits of every token worth drafting."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def __call__(self, row: int, hidden: Tensor) -> Scored:
        """hidden [B, hidden_size], of row `row`, corrected."""
        del row
        logits, ids = self._model.draft_logits(hidden)
        return Scored(logits, None if ids is None else ids.expand_as(logits))


class _Candidates:
    """The logits of a few candidates of each row.

    Args:
        hidden: [B, G, hidden_size], not corrected.
    """

    def __init__(self, model: CausalLM, hidden: Tensor) -> None:
        logits, ids = model.draft_logits(hidden.flatten(0, 1))
        columns = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1, sorted=False).indices
        of_row = (columns if ids is None else ids[columns]).view(*hidden.shape[:2], -1)
        self._ids = of_row.unbind(1)
        self._model = model

    def __call__(self, row: int, hidden: Tensor) -> Scored:
        """hidden [B, hidden_size], of row `row`, corrected."""
        rows = self._model.head_rows(self._ids[row])  # [B, K, hidden_size]
        logits = torch.bmm(rows, self._model.normalise(hidden)[:, :, None]).squeeze(-1)
        return Scored(self._model.cap(logits.float()), self._ids[row])


class Choice:
    """Chooses as `sampling.choose` will, for drafts of `width` rows."""

    def __init__(self, prospects: Sequence[Prospect], width: int, device: torch.device) -> None:
        self._prospects = prospects
        self._params = [p.state.params for p in prospects]
        self._alters = any(p.state.alters for p in prospects)
        self._greedy = all(p.greedy for p in self._params)
        if self._greedy:
            return
        self._truncates = any(p.top_k or p.top_p < 1.0 or p.min_p for p in self._params)
        temperatures = [1.0 if p.greedy else p.temperature for p in self._params]
        self._temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
        keys = [fold(p.state.key(p.index + row)) for row in range(width) for p in prospects]
        self._keys = to_device(keys, device).int().view(width, -1, 1)
        greedy = [p.greedy for p in self._params]
        self._noiseless = torch.tensor(greedy, device=device)[:, None] if any(greedy) else None

    def __call__(self, row: int, scored: Scored) -> tuple[Tensor, Tensor]:
        """The token of row `row` of every draft, [B], and how clearly it won, [B], from 0 to 1.

        That is its share of the softmax over the scores, noise included: a token that won by
        little may lose by the verifier's scores.
        """
        logits, ids = self._altered(row, scored) if self._alters else scored
        if not self._greedy:
            best, columns = logits.topk(min(NUM_SAMPLED, logits.shape[-1]), dim=-1)
            ids = columns if ids is None else ids.gather(1, columns)
            logits = self._noisy(row, best, ids)
        share, column = logits.softmax(-1).max(-1, keepdim=True)
        return (column if ids is None else ids.gather(1, column)).squeeze(1), share.squeeze(1)

    def _altered(self, row: int, scored: Scored) -> Scored:
        """Penalties, bias and bans need a column for every token; those not scored stay out of the running."""
        logits, ids = scored
        if ids is not None:
            whole = logits.new_full((len(logits), self._prospects[0].state.vocab_size), float("-inf"))
            logits = whole.scatter_(1, ids, logits)
        for p, line in zip(self._prospects, torch.split(logits, 1), strict=True):
            if p.state.alters:
                p.state.alter(line, (), p.index + row)
        return Scored(logits, None)

    def _noisy(self, row: int, logits: Tensor, ids: Tensor) -> Tensor:
        """logits [B, K] of tokens `ids`, by temperature and with the noise of the token to be chosen."""
        scores = logits / self._temperature
        if self._truncates and (keep := survivors(scores.softmax(-1), self._params)) is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        log_noise = exponential(noise_bits(self._keys[row], ids.int())).log().float()
        return scores - (log_noise if self._noiseless is None else log_noise.masked_fill_(self._noiseless, 0.0))
