"""From a row of logits to a token, the same token whoever asks.

A token is a function of its logits, the params and a key made of the seed, the number of
the choice and the token's place in the sequence. Without temperature it is the largest
logit; otherwise the largest p / e, where e is exponential noise that depends on key and
token id alone (the Gumbel-max trick). So a row can be sampled in any batch, in any order,
once or twice, and a drafter that knows the key can foresee the noise.

Every step below works row by row, and takes the same path for a row whoever its
neighbours are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from skippy.engine.tensors import to_device
from skippy.engine.types import SamplingParams

_MASK64 = 2**64 - 1
SAMPLED_AT_ONCE = 2**23
"""Scores that are sampled from together, in half a dozen arrays of their size: what a GPU keeps free bears that."""
_FEW = 512
"""How many of the likeliest tokens top_p looks at before it sorts them all."""


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
        self.vocab_size = vocab_size
        self._seed, self._choice = seed, choice
        self._banned = to_device(sorted(banned), device)
        self._bias_ids = to_device(list(params.logit_bias), device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._prompt, self._device = prompt, device
        self._counts: Tensor | None = None  # [V] float32, occurrences in the output
        self._seen: Tensor | None = None  # [V] bool, occurrences in prompt and output

    @property
    def alters(self) -> bool:
        """Whether `alter` can change anything."""
        p = self.params
        return p.penalises or bool(p.logit_bias) or p.min_tokens > 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Count tokens that were emitted."""
        self._begin_counting()
        for token in tokens:
            if self._counts is not None:
                self._counts[token] += 1
            if self._seen is not None:
                self._seen[token] = True

    def _begin_counting(self) -> None:
        """Not before the first choice: what a thousand waiting ones would count with could fill a GPU."""
        params = self.params
        if self._counts is None and (params.presence_penalty or params.frequency_penalty):
            self._counts = torch.zeros(self.vocab_size, device=self._device)
        if self._seen is None and params.repetition_penalty != 1.0:
            self._seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self._device)
            self._seen[to_device(list(self._prompt), self._device)] = True

    def alter(self, logits: Tensor, draft: Sequence[int], index: int) -> None:
        """Apply penalties, bias and bans in place.

        logits [R, V] float32: row j chooses the token at absolute index `index + j`, after
        the emitted tokens and draft[:j].
        """
        self._begin_counting()
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
    keys: list[int] = []
    owners: list[SamplingParams] = []
    for group in groups:
        end = row + group.num_rows
        if group.state.alters:
            group.state.alter(logits[row:end], group.draft, group.index)
        if not group.state.params.greedy:
            sampled += range(row, end)
            keys += [group.state.key(group.index + j) for j in range(group.num_rows)]
            owners += [group.state.params] * group.num_rows
        row = end
    tokens = logits.argmax(-1)
    if sampled:
        at_once = max(1, SAMPLED_AT_ONCE // logits.shape[-1])
        for start in range(0, len(sampled), at_once):
            part = slice(start, start + at_once)
            rows = to_device(sampled[part], logits.device)
            temperatures = [params.temperature for params in owners[part]]
            scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
            tokens[rows] = _sample(logits[rows] / scale[:, None], owners[part], keys[part])
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
    """[R] int64: the token with the largest p / e among those that truncation leaves.

    That is Gumbel-max without its outer logarithms. Most tokens are ruled out by integers
    alone: e = -log1p(-u) is never below u, so a token whose u is above p / best, with the
    likeliest token's ratio for `best`, cannot win. scaled [R, V] = logits / temperature.
    """
    probs = torch.softmax(scaled, -1)
    keep = survivors(probs, params)
    folded = to_device([fold(key) for key in keys], probs.device).int()
    bits = _bits(_mixed_ids(probs.shape[1], probs.device) ^ folded[:, None])
    top, place = probs.max(-1, keepdim=True)
    best = top.double() / exponential(bits.gather(1, place))
    # A thousandth more than the bound, so that float32 rounding rules nobody out.
    possible = bits <= probs * (1.001 * 2.0**24 / best).float()
    rows, ids = (possible if keep is None else possible & keep).nonzero(as_tuple=True)
    ratio = probs[rows, ids].double() / exponential(bits[rows, ids])
    largest = torch.zeros(len(probs), dtype=torch.float64, device=probs.device).scatter_reduce_(0, rows, ratio, "amax")
    wins = ratio == largest[rows]
    winner = torch.full((len(probs),), probs.shape[1], device=probs.device)
    return winner.scatter_reduce_(0, rows[wins], ids[wins], "amin")


def fold(key: int) -> int:
    """The 32 bits of a 64-bit key that the noise is made of, as an int32."""
    return _signed32(key ^ key >> 32)


def noise_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """24 uniform bits, int32, for every pair of a folded key and a token id (int32, broadcast)."""
    return _bits(_mix32(ids) ^ keys)


@lru_cache(4)
def _mixed_ids(vocab_size: int, device: torch.device) -> Tensor:
    """[V] int32: what `noise_bits` makes of every token id, whatever the key. Half of its work."""
    return _mix32(torch.arange(vocab_size, dtype=torch.int32, device=device))


def _bits(mixed: Tensor) -> Tensor:
    return (_mix32(mixed) >> 8).bitwise_and_(0xFFFFFF)


def exponential(bits: Tensor) -> Tensor:
    """Standard exponential noise, float64: e = -log1p(-u) with u in [2^-25, 1 - 2^-25]."""
    return -torch.log1p((bits.double() + 0.5) * -(2.0**-24))


def exponential_of(key: int, token: int) -> float:
    """`exponential(noise_bits(key, token))` of one pair, without a tensor: for a few it is ten times as fast."""
    mixed = _mix32_int(_mix32_int(token) ^ key & 0xFFFFFFFF)
    return -math.log1p(-((mixed >> 8) + 0.5) * 2.0**-24)


def survivors(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """[R, V] bool: the tokens that top_k, top_p and min_p leave in the running; None for all."""
    truncated = [p.top_k > 0 or p.top_p < 1.0 for p in params]
    min_p = [p.min_p for p in params]
    if not any(truncated) and not any(min_p):
        return None
    least = probs.amax(-1) * torch.tensor(min_p, device=probs.device)
    if not any(truncated):
        return probs >= least[:, None]
    edge, count = _heads(probs, params)
    least = torch.maximum(least, edge)
    keep = probs >= least[:, None]
    # Tokens tied at the edge: those with the lowest ids stay.
    crowded = (keep.sum(-1) > count) & (least == edge)
    for row in crowded.nonzero()[:, 0].tolist():
        tied = (probs[row] == edge[row]).nonzero()[:, 0]
        spare = int(count[row]) - int((probs[row] > edge[row]).sum())
        keep[row, tied[spare:]] = False
    return keep


def _heads(probs: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """What top_k, then top_p keep: the probability of the last token kept and how many are, [R] each."""
    size = probs.shape[1]
    limits = [min(p.top_k or size, size) for p in params]
    few = min(_FEW, size)
    edge, count, enough = _head_of(probs.topk(few).values, params, limits, size)
    for row in (~enough).nonzero()[:, 0].tolist():
        best = probs[row : row + 1].topk(limits[row]).values
        edge[row : row + 1], count[row : row + 1], _ = _head_of(best, [params[row]], [limits[row]], size)
    return edge, count


def _head_of(
    best: Tensor, params: Sequence[SamplingParams], limits: list[int], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`_heads` judged by the likeliest tokens alone, best [R, K] in falling order; and where K was enough."""
    few, device = best.shape[1], best.device
    limit = to_device(limits, device)
    seen = limit.clamp(max=few)
    mass = best.double().cumsum(-1)
    # Renormalised over what top_k left; over everything, the mass is 1.
    whole = torch.where(limit < size, mass.gather(1, seen[:, None] - 1)[:, 0], 1.0)
    goal = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device) * whole
    # A token stays while the mass before it is short of the goal.
    by_mass = (mass < goal[:, None]).sum(-1) + 1
    unbounded = torch.tensor([p.top_p >= 1.0 for p in params], device=device)
    count = torch.where(unbounded, seen, torch.minimum(by_mass, seen))
    edge = best.gather(1, count[:, None] - 1)[:, 0]
    everything = (limit == size) & unbounded
    enough = (limit <= few) | ((limit == size) & (unbounded | (by_mass <= few)))
    return edge.masked_fill(everything, 0.0), count.masked_fill(everything, size), enough


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64 (doi 10.1145/2660193.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer in wrapping int32 arithmetic; `>>` keeps the sign, so it is masked."""
    x = x ^ (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _mix32_int(x: int) -> int:
    """`_mix32` of one number, unsigned."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _signed32(x: int) -> int:
    """The low 32 bits of x as a two's complement number."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
