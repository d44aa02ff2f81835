"""From a row of logits to a token, the same token whoever asks.

A token is a function of (logits, params, key), where the key is (seed, choice index,
absolute index of the token). Greedy is argmax. Sampling is Gumbel-max: the token with the
largest log p - log e, where e is exponential noise that depends on key and token id alone.
So a row can be sampled in any batch, in any order, once or twice, and a drafter that knows
the key can foresee the noise.

Every step below works row by row, and takes the same path for a row whoever its
neighbours are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skippy.engine.tensors import to_device
from skippy.engine.types import SamplingParams

_MASK64 = 2**64 - 1
_MASK32 = 2**32 - 1

# With u in [2^-25, 1 - 2^-25] the noise -log(e) lies in [-2.86, 17.33], so a token that
# trails the best by more than their difference cannot win, whatever its noise.
_HOPELESS = 20.2
_FEW = 256
"""How many of the best tokens top_p looks at before it sorts them all."""


class SamplingState:
    """What choosing needs to know of one sequence: its key, and what alters its logits.

    Args:
        prompt: the prompt's token ids.
        seed, choice: the first two parts of every key of the sequence.
        banned: tokens that min_tokens bans (those that would end the output).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        seed: int,
        choice: int,
        banned: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.prompt_len = len(prompt)
        self._seed, self._choice = seed, choice
        self._banned = to_device(sorted(banned), device)
        self._bias_ids = to_device(list(params.logit_bias), device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._counts: Tensor | None = None  # [V] float32, occurrences in the output
        self._seen: Tensor | None = None  # [V] bool, occurrences in prompt and output
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[to_device(list(prompt), device)] = True

    @property
    def alters(self) -> bool:
        """Whether `alter` can change anything."""
        p = self.params
        return self._counts is not None or self._seen is not None or bool(p.logit_bias) or p.min_tokens > 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Count tokens that were emitted."""
        for token in tokens:
            if self._counts is not None:
                self._counts[token] += 1
            if self._seen is not None:
                self._seen[token] = True

    def alter(self, logits: Tensor, draft: Sequence[int], index: int) -> None:
        """Apply penalties, bias and bans in place.

        logits [R, V] float32: row j chooses the token at absolute index `index + j`, after
        the emitted tokens and draft[:j].
        """
        if self._seen is not None:
            seen = _rows_after(self._seen, draft, len(logits))
            scaled = torch.where(
                logits > 0, logits / self.params.repetition_penalty, logits * self.params.repetition_penalty
            )
            logits.copy_(torch.where(seen, scaled, logits))
        if self._counts is not None:
            counts = _rows_after(self._counts, draft, len(logits))
            logits -= counts * self.params.frequency_penalty
            logits -= (counts > 0) * self.params.presence_penalty
        if len(self._bias):
            logits[:, self._bias_ids] += self._bias
        banned_rows = self.prompt_len + self.params.min_tokens - index
        if banned_rows > 0 and len(self._banned):
            logits[:banned_rows, self._banned] = float("-inf")

    def key(self, index: int) -> int:
        """64 bits for the token at an absolute index."""
        return _mix64(_mix64(_mix64(self._seed & _MASK64) + self._choice) + index)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Consecutive rows of logits of one sequence.

    Row j chooses the token at absolute index `index + j` after draft[:j]; there are
    len(draft) + 1 rows.
    """

    state: SamplingState
    index: int
    draft: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        return len(self.draft) + 1


def choose(logits: Tensor, groups: Sequence[RowGroup]) -> list[list[int]]:
    """The token of every row.

    Args:
        logits: [M, V] float32, raw; not changed. M is the sum of the groups' rows.
    """
    if any(group.state.alters for group in groups):
        logits = logits.clone()
    row = 0
    sampled: list[int] = []
    temperatures: list[float] = []
    keys: list[int] = []
    owners: list[SamplingParams] = []
    for group in groups:
        end = row + group.num_rows
        if group.state.alters:
            group.state.alter(logits[row:end], group.draft, group.index)
        if not group.state.params.greedy:
            sampled += range(row, end)
            temperatures += [group.state.params.temperature] * group.num_rows
            keys += [group.state.key(group.index + j) for j in range(group.num_rows)]
            owners += [group.state.params] * group.num_rows
        row = end
    tokens = logits.argmax(-1)
    if sampled:
        rows = to_device(sampled, logits.device)
        scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
        tokens[rows] = _sample(logits[rows] / scale[:, None], owners, keys)
    flat = tokens.tolist()
    chosen, row = [], 0
    for group in groups:
        chosen.append(flat[row : row + group.num_rows])
        row += group.num_rows
    return chosen


def logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Natural log-probabilities of raw logits: of the given tokens, and of the `count` likeliest.

    logits [R, V], one token per row.
    """
    values = torch.log_softmax(logits, -1)
    of_tokens = values.gather(1, to_device(list(tokens), logits.device)[:, None])[:, 0].tolist()
    if count == 0:
        return of_tokens, [[] for _ in tokens]
    best, ids = values.topk(count, dim=-1)
    return of_tokens, [list(zip(i, b, strict=True)) for i, b in zip(ids.tolist(), best.tolist(), strict=True)]


def _rows_after(base: Tensor, draft: Sequence[int], num_rows: int) -> Tensor:
    """[num_rows, V]: row j is `base` with draft[:j] counted in."""
    rows = base.repeat(num_rows, 1)
    for place, token in enumerate(draft[: num_rows - 1]):
        if base.dtype == torch.bool:
            rows[place + 1 :, token] = True
        else:
            rows[place + 1 :, token] += 1
    return rows


def _sample(scaled: Tensor, params: Sequence[SamplingParams], keys: Sequence[int]) -> Tensor:
    """[R] int64: Gumbel-max over the tokens that truncation leaves. scaled [R, V] = logits / temperature."""
    logp = torch.log_softmax(scaled, -1)
    rows, ids = _survivors(logp, params).nonzero(as_tuple=True)
    low = to_device([key & _MASK32 for key in keys], logp.device)
    high = to_device([key >> 32 for key in keys], logp.device)
    scores = logp[rows, ids].double() + gumbel(low[rows], high[rows], ids)
    best = torch.full((len(logp),), float("-inf"), dtype=torch.float64, device=logp.device)
    best.scatter_reduce_(0, rows, scores, "amax")
    wins = scores == best[rows]
    winner = torch.full((len(logp),), logp.shape[1], device=logp.device)
    return winner.scatter_reduce_(0, rows[wins], ids[wins], "amin")


def gumbel(low: Tensor, high: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [S] float64 of a key's two 32-bit halves and a token id, all [S] int64.

    Counter-based: a hash makes 24 uniform bits, u in [2^-25, 1 - 2^-25], and the noise is
    -log(-log1p(-u)).
    """
    bits = _mix32(_mix32(ids ^ low) + high & _MASK32)
    uniform = ((bits >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-uniform))


def _survivors(logp: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[R, V] bool: the tokens that top_k, top_p and min_p leave in the running."""
    best = logp.amax(-1)
    least = best - _HOPELESS
    min_p = [p.min_p for p in params]
    if any(min_p):
        floors = torch.tensor([math.log(m) if m else -math.inf for m in min_p], device=logp.device)
        least = torch.maximum(least, best + floors)
    cut = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    if not cut:
        return logp >= least[:, None]
    limits = [_head(logp[row], params[row].top_k, params[row].top_p) for row in cut]
    rows = to_device(cut, logp.device)
    least[rows] = torch.maximum(least[rows], torch.tensor([value for value, _ in limits], device=logp.device))
    keep = logp >= least[:, None]
    for row, (value, count) in zip(cut, limits, strict=True):
        # Tokens tied at the edge: those with the lowest ids stay.
        if float(least[row]) == value and int(keep[row].sum()) > count:
            tied = (logp[row] == value).nonzero()[:, 0]
            keep[row, tied[count - int((logp[row] > value).sum()) :]] = False
    return keep


def _head(logp: Tensor, top_k: int, top_p: float) -> tuple[float, int]:
    """The value of the last token that top_k, then top_p keep, and how many they keep. logp [V]."""
    size = len(logp)
    limit = min(top_k or size, size)
    for few in (min(_FEW, limit), limit):
        values = logp.topk(few).values
        if top_p >= 1.0 and few == limit:
            return float(values[-1]), few
        mass = values.double().exp().cumsum(0)
        # Renormalised over what top_k left; over everything, the mass is 1.
        goal = top_p * (float(mass[-1]) if top_k else 1.0)
        if few == limit or (not top_k and float(mass[-1]) >= goal):
            # A token stays while the mass before it is short of the goal.
            count = min(int((mass < goal).sum()) + 1, few)
            return float(values[count - 1]), count
    raise AssertionError("the last round returns")


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64 (doi 10.1145/2660193.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer in int64 arithmetic (the low half of a product does not mind overflow)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _MASK32
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _MASK32
    return x ^ (x >> 16)
