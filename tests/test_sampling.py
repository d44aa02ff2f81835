"""Choosing a token: against the plain reference, against the distribution, and whoever else is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skippy.engine import sampling
from skippy.engine.reference import reference_choice
from skippy.engine.sampling import (
    RowGroup,
    SamplingState,
    choose,
    exponential,
    exponential_of,
    fold,
    logprobs,
    noise_bits,
)
from skippy.engine.types import SamplingParams

CPU = torch.device("cpu")
VOCAB = 12
PROMPT = [3, 1, 4, 1, 5]
ENDS = (2, 7)


def state_of(
    params: SamplingParams, *, output: Sequence[int] = (), seed: int = 0, choice: int = 0, vocab: int = VOCAB
) -> SamplingState:
    state = SamplingState(params, PROMPT, seed, choice, ENDS, vocab, CPU)
    state.extend(output)
    return state


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: Tensor, params: SamplingParams, count: int, seed: int = 0, choice: int = 0) -> list[int]:
    """The tokens that one row of logits gives at `count` indices."""
    state = state_of(params, seed=seed, choice=choice, vocab=len(logits))
    groups = [RowGroup(state, len(PROMPT) + i) for i in range(count)]
    return [token for (token,) in choose(logits.expand(count, -1), groups)]


# Multiples of a quarter add up exactly, so ties are ties in every precision.
quarters = st.integers(-24, 24).map(lambda i: i / 4)


@st.composite
def some_params(draw: st.DrawFn) -> SamplingParams:
    """Each option off, or anything that keeps sums exact."""

    def maybe(off: float, values: st.SearchStrategy[float]) -> float:
        return draw(st.just(off) | values)

    return SamplingParams(
        max_tokens=16,
        temperature=maybe(1.0, st.sampled_from([0.0, 0.3, 0.8, 2.0, 10.0])),
        top_p=maybe(1.0, st.floats(0.01, 1.0)),
        top_k=int(maybe(0, st.integers(1, VOCAB + 2))),
        min_p=maybe(0.0, st.floats(0.0, 1.0)),
        presence_penalty=maybe(0.0, st.integers(-8, 8).map(lambda i: i / 4)),
        frequency_penalty=maybe(0.0, st.integers(-8, 8).map(lambda i: i / 4)),
        repetition_penalty=maybe(1.0, st.sampled_from([0.5, 2.0, 4.0])),
        logit_bias=draw(st.just({}) | st.dictionaries(st.integers(0, VOCAB - 1), quarters, max_size=3)),
        min_tokens=draw(st.integers(0, 5)),
    )


@st.composite
def some_groups(draw: st.DrawFn) -> list[tuple[SamplingParams, list[int], list[int], list[list[float]], int]]:
    """Params, output, draft and logits of a few sequences, each with its seed."""
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=4)
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        output, draft = draw(ids), draw(ids)
        row = st.lists(quarters, min_size=VOCAB, max_size=VOCAB)
        logits = draw(st.lists(row, min_size=len(draft) + 1, max_size=len(draft) + 1))
        groups.append((draw(some_params()), output, draft, logits, draw(st.integers(-(2**63), 2**63 - 1))))
    return groups


def near(params: SamplingParams) -> list[SamplingParams]:
    """The same, and with the edges of top_p and min_p a hair to either side."""
    tops = {params.top_p, *(min(1.0, params.top_p * (1 + e)) for e in (-1e-5, 1e-5) if params.top_p < 1)}
    mins = {params.min_p, *(min(1.0, params.min_p * (1 + e)) for e in (-1e-5, 1e-5))}
    return [replace(params, top_p=top_p, min_p=min_p) for top_p in tops for min_p in mins]


class TestReference:
    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(groups=some_groups(), choice=st.integers(0, 127))
    def test_every_row_is_what_the_reference_chooses(
        self, groups: list[tuple[SamplingParams, list[int], list[int], list[list[float]], int]], choice: int
    ) -> None:
        states = [state_of(p, output=output, seed=seed, choice=choice) for p, output, _, _, seed in groups]
        rows = [
            RowGroup(state, len(PROMPT) + len(output), draft)
            for state, (_, output, draft, _, _) in zip(states, groups, strict=True)
        ]
        chosen = choose(torch.tensor([row for *_, logits, _ in groups for row in logits]), rows)
        for state, (params, output, draft, logits, _), tokens in zip(states, groups, chosen, strict=True):
            for place, token in enumerate(tokens):
                history = [*PROMPT, *output, *draft[:place]]
                key = state.key(len(history))
                row = torch.tensor(logits[place])
                answers = [reference_choice(row, p, len(PROMPT), history, ENDS, key) for p in near(params)]
                tie = min(margin for _, margin in answers) < 1e-4
                assert token in {answer for answer, _ in answers} or (tie and not params.greedy)


class TestCompany:
    """A row is chosen alike in every batch."""

    OPTIONS: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2, "temperature": 1.5},
        {"top_p": 0.9, "top_k": 300, "repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"logit_bias": {1: 5.0}, "min_tokens": 9},
    )

    @pytest.mark.parametrize("vocab", [VOCAB, 700])
    def test_together_or_alone(self, vocab: int) -> None:
        groups, sizes = [], []
        for number in range(64):
            params = SamplingParams(**self.OPTIONS[number % len(self.OPTIONS)])
            state = state_of(params, output=[number % VOCAB], seed=number, vocab=vocab)
            draft = [number % 5, 2, 3][: number % 4]
            groups.append(RowGroup(state, len(PROMPT) + 1, draft))
            sizes.append(len(draft) + 1)
        logits = random_logits(sum(sizes), vocab)
        together = choose(logits, groups)
        for group, rows, tokens in zip(groups, torch.split(logits, sizes), together, strict=True):
            assert choose(rows, [group]) == [tokens]
        backwards = choose(torch.cat(torch.split(logits, sizes)[::-1]), groups[::-1])
        assert backwards[::-1] == together

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_drafted_rows_are_those_of_plain_decoding(self, options: dict[str, Any]) -> None:
        params, logits = SamplingParams(**options), random_logits(6)
        state, plain = state_of(params, seed=5), []
        for index in range(6):
            (token,) = choose(logits[index : index + 1], [RowGroup(state, len(PROMPT) + index)])[0]
            plain.append(token)
            state.extend([token])
        drafted = choose(logits, [RowGroup(state_of(params, seed=5), len(PROMPT), plain[:5])])
        assert drafted == [plain]

    def test_the_logits_are_not_changed(self) -> None:
        params = SamplingParams(logit_bias={3: 4.0}, presence_penalty=1.0, repetition_penalty=2.0, min_tokens=3)
        logits = random_logits(3)
        before = logits.clone()
        choose(logits, [RowGroup(state_of(params, output=[3]), len(PROMPT) + 1, [4, 5])])
        assert torch.equal(logits, before)


def chi_square_limit(freedom: int) -> float:
    """What chi-square exceeds by chance once in 10,000 times (Wilson and Hilferty)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


def survivors(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that sampling should follow, computed from its definition."""
    p = (logits.double() / params.temperature).softmax(-1)
    order = p.argsort(descending=True, stable=True)
    kept = order[: params.top_k or None]
    before = p[kept].cumsum(0) - p[kept]
    kept = kept[before < params.top_p * p[kept].sum()]
    kept = kept[p[kept] >= params.min_p * p.max()]
    result = torch.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


class TestDistribution:
    SAMPLES = 20_000

    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.15},
         {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3}],
        ids=str,
    )  # fmt: skip
    def test_tokens_follow_the_distribution(self, options: dict[str, Any]) -> None:
        params, logits = SamplingParams(**options), random_logits(1, seed=3)[0]
        expected = survivors(logits, params) * self.SAMPLES
        counts = Counter(draw(logits, params, self.SAMPLES))
        assert set(counts) <= set(expected.nonzero().flatten().tolist()), "what was cut is never chosen"
        common = [token for token in range(VOCAB) if expected[token] >= 5]
        chi_square = sum((counts[t] - float(expected[t])) ** 2 / float(expected[t]) for t in common)
        assert chi_square < chi_square_limit(len(common) - 1)

    @pytest.mark.parametrize("vary", ["index", "seed", "choice"])
    def test_every_part_of_the_key_gives_independent_noise(self, vary: str) -> None:
        count, params, logits = 4_000, SamplingParams(), torch.zeros(2, 4)
        groups = []
        for i in range(count):
            state = state_of(params, seed=i if vary == "seed" else 0, choice=i if vary == "choice" else 0, vocab=4)
            groups.append(RowGroup(state, 9 + (i if vary == "index" else 0)))
        tokens = [token for (token,) in choose(logits[:1].expand(count, -1), groups)]
        pairs = Counter(pairwise(tokens))
        expected = (count - 1) / 16
        assert sum((pairs[a, b] - expected) ** 2 / expected for a in range(4) for b in range(4)) < chi_square_limit(15)

    def test_a_seed_repeats_itself(self) -> None:
        logits, params = random_logits(1)[0], SamplingParams()
        assert draw(logits, params, 50, seed=1) == draw(logits, params, 50, seed=1)
        assert draw(logits, params, 50, seed=1) != draw(logits, params, 50, seed=2)
        assert draw(logits, params, 50, seed=1) != draw(logits, params, 50, seed=1, choice=1)


class TestNoise:
    def bits(self, key: int, count: int = 200_000) -> Tensor:
        return noise_bits(torch.tensor(fold(key), dtype=torch.int32), torch.arange(count, dtype=torch.int32))

    def test_it_is_finite_and_positive_at_both_ends_of_its_range(self) -> None:
        noise = exponential(torch.tensor([0, 2**24 - 1], dtype=torch.int32))
        assert 0 < float(noise[0]) < 2**-24
        assert 17 < float(noise[1]) < 18

    def test_the_bits_are_uniform(self) -> None:
        bits = self.bits(12345)
        assert 0 <= int(bits.min()) < 1000
        assert 2**24 - 1000 < int(bits.max()) < 2**24
        counts = torch.bincount(bits >> 16, minlength=256)
        expected = len(bits) / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(255)

    @pytest.mark.parametrize("key", [0, 1, -1, 2**31 - 1, -(2**31), 123456789])
    def test_that_of_one_pair_is_the_same(self, key: int) -> None:
        ids = [0, 1, 77, 8191, 128255, 2**31 - 1]
        noise = exponential(noise_bits(torch.tensor(key, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32)))
        assert [exponential_of(key, token) for token in ids] == pytest.approx(noise.tolist(), rel=1e-12)

    def test_it_is_standard_exponential(self) -> None:
        noise = exponential(self.bits(99))
        assert float(noise.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(noise.var()) == pytest.approx(1.0, abs=0.03)

    def test_it_depends_on_both_halves_of_the_key_and_on_the_token(self) -> None:
        plain = self.bits(5 << 32 | 5)
        assert torch.equal(plain, self.bits(5 << 32 | 5))
        for other in (5 << 32 | 6, 6 << 32 | 5):
            assert (plain == self.bits(other)).float().mean() < 1e-3
        assert len(set(plain.tolist())) > 0.98 * len(plain)

    def test_the_key_is_64_bits_of_seed_choice_and_index(self) -> None:
        keys = {
            state_of(SamplingParams(), seed=seed, choice=choice).key(index)
            for seed in (0, 1, -1, 2**63 - 1, -(2**63))
            for choice in range(4)
            for index in range(50)
        }
        assert len(keys) == 5 * 4 * 50
        assert all(0 <= key < 2**64 for key in keys)


class TestTruncation:
    def chosen(self, logits: Sequence[float], count: int = 400, **options: Any) -> set[int]:
        return set(draw(torch.tensor(logits), SamplingParams(**options), count))

    def test_of_tokens_tied_at_the_edge_of_top_k_the_lowest_ids_stay(self) -> None:
        assert self.chosen([0.0, 1.0, 0.0, 0.0, 1.0], top_k=3) == {0, 1, 4}
        assert self.chosen([2.0] * 8, top_k=3) == {0, 1, 2}
        assert self.chosen([0.0, 0.0, 1.0], top_k=1) == {2}

    def test_of_tokens_tied_at_the_edge_of_top_p_the_lowest_ids_stay(self) -> None:
        assert self.chosen([0.0] * 8, top_p=0.3) == {0, 1, 2}

    def test_top_p_keeps_the_token_that_reaches_it(self) -> None:
        logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
        assert self.chosen(logits, top_p=0.49) == {0}
        assert self.chosen(logits, top_p=0.51) == {0, 1}
        assert self.chosen(logits, top_p=0.96) == {0, 1, 2, 3}

    def test_top_p_counts_what_top_k_left(self) -> None:
        logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
        assert self.chosen(logits, top_p=0.55) == {0, 1}
        assert self.chosen(logits, top_p=0.55, top_k=2) == {0}, "0.4 of 0.7 is enough"

    def test_min_p_is_relative_to_the_best(self) -> None:
        logits = [math.log(p) for p in (0.5, 0.26, 0.14, 0.1)]
        assert self.chosen(logits, min_p=0.5) == {0, 1}
        assert self.chosen(logits, min_p=1.0) == {0}

    def test_a_lone_survivor_always_wins(self) -> None:
        logits = [0.0, 0.1, 0.0, 0.0]
        for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"logit_bias": {1: 100.0}}):
            assert self.chosen(logits, temperature=5.0, **options) == {1}

    def test_top_p_over_a_long_flat_tail(self) -> None:
        flat = torch.zeros(2_000)
        tokens = draw(flat, SamplingParams(top_p=0.4998), 3_000)
        assert max(tokens) < 1_000
        assert len(set(tokens)) > 900, "the head is longer than what is looked at first"

    def test_hopeless_tokens_change_nothing(self) -> None:
        logits = torch.cat((torch.tensor([1.0, 0.5]), torch.full((5_000,), -25.0)))
        assert draw(logits, SamplingParams(), 500) == draw(logits[:2], SamplingParams(), 500)

    def test_extreme_logits_are_chosen_from(self) -> None:
        assert self.chosen([-1e30, 3.0, -math.inf, 1e4]) == {3}
        assert self.chosen([0.0, 1.0, 2.0], temperature=100.0) == {0, 1, 2}


class TestGreedy:
    @pytest.mark.parametrize("temperature", [0.0, 9e-6])
    def test_the_best_wins_whatever_the_seed(self, temperature: float) -> None:
        logits = random_logits(1)[0]
        for seed in range(5):
            assert set(draw(logits, SamplingParams(temperature=temperature), 5, seed)) == {int(logits.argmax())}

    def test_of_equals_the_lowest_id_wins(self) -> None:
        assert draw(torch.tensor([0.0, 2.0, 2.0, 1.0]), SamplingParams(temperature=0.0), 1) == [1]

    def test_penalties_apply(self) -> None:
        params = SamplingParams(temperature=0.0, presence_penalty=2.0)
        logits = torch.zeros(1, VOCAB)
        logits[0, 8], logits[0, 9] = 1.0, 0.5
        assert choose(logits, [RowGroup(state_of(params), 5)]) == [[8]]
        assert choose(logits, [RowGroup(state_of(params, output=[8]), 6)]) == [[9]]


def test_how_many_rows_are_sampled_together_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(temperature=t, seed=i, top_p=p) for i, (t, p) in enumerate([(0.7, 1), (0, 1), (1.3, 0.9)])]
    groups = [RowGroup(state_of(each, seed=i), len(PROMPT), (1, 2, 3)) for i, each in enumerate(params)]
    logits = random_logits(sum(group.num_rows for group in groups))
    together = choose(logits, groups)
    monkeypatch.setattr(sampling, "SAMPLED_AT_ONCE", 3 * VOCAB)
    assert choose(logits, groups) == together


class TestAlterations:
    """What `alter` does to logits, row by row of a draft."""

    def altered(
        self,
        params: SamplingParams,
        draft: Sequence[int] = (),
        output: Sequence[int] = (),
        logits: Tensor | None = None,
    ) -> Tensor:
        result = torch.ones(len(draft) + 1, VOCAB) if logits is None else logits.clone()
        state_of(params, output=output).alter(result, draft, len(PROMPT) + len(output))
        return result

    def test_drafted_tokens_count_row_by_row(self) -> None:
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
        rows = self.altered(params, draft=[9, 9, 8], output=[8])
        assert rows[:, 9].tolist() == [1.0, 0.25, 0.0, 0.0]
        assert rows[:, 8].tolist() == [0.25, 0.25, 0.25, 0.0]
        assert (rows[:, :8] == 1).all(), "the prompt does not count"

    def test_repetition_counts_prompt_output_and_draft(self) -> None:
        logits = torch.tensor([[2.0, -2.0] * 6] * 3)
        rows = self.altered(SamplingParams(repetition_penalty=2.0), [10, 11], [6], logits)
        seen = [{*PROMPT, 6}, {*PROMPT, 6, 10}, {*PROMPT, 6, 10, 11}]
        for row, tokens in zip(rows, seen, strict=True):
            for token in range(VOCAB):
                plain, penalised = (2.0, 1.0) if token % 2 == 0 else (-2.0, -4.0)
                assert row[token] == (penalised if token in tokens else plain)

    def test_who_only_waits_holds_no_row_of_the_vocabulary(self) -> None:
        """A thousand choices may wait."""
        params = SamplingParams(presence_penalty=0.5, repetition_penalty=2.0, logit_bias={4: 1.0})
        state = SamplingState(params, PROMPT, 0, 0, ENDS, VOCAB, CPU)
        assert state.alters
        assert not [value for value in vars(state).values() if isinstance(value, Tensor) and value.numel() >= VOCAB]

    def test_bias_is_added_at_every_row(self) -> None:
        rows = self.altered(SamplingParams(logit_bias={4: 2.5, 0: -100.0}), [1, 1])
        assert rows[:, 4].tolist() == [3.5] * 3
        assert rows[:, 0].tolist() == [-99.0] * 3

    @pytest.mark.parametrize(("output", "banned"), [(0, [True, True, True, False]), (2, [True] + [False] * 3)])
    def test_min_tokens_bans_the_ends_until_so_many_are_there(self, output: int, banned: list[bool]) -> None:
        rows = self.altered(SamplingParams(min_tokens=3), [5, 5, 5], [6] * output)
        for end in ENDS:
            assert (rows[:, end] == -math.inf).tolist() == banned
        assert rows[:, [0, 1, 3, 4, 5, 6]].isfinite().all()

    def test_repetition_comes_before_presence_and_bias(self) -> None:
        params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={3: 0.5})
        row = self.altered(params, output=[3], logits=torch.full((1, VOCAB), 4.0))
        assert row[0, 3] == 4.0 / 2 - 1.0 + 0.5

    def test_a_ban_outweighs_a_bias(self) -> None:
        row = self.altered(SamplingParams(min_tokens=1, logit_bias={ENDS[0]: 100.0}))
        assert row[0, ENDS[0]] == -math.inf

    def test_plain_params_alter_nothing(self) -> None:
        assert not state_of(SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)).alters
        logits = random_logits(2)
        assert torch.equal(self.altered(SamplingParams(), [1], logits=logits), logits)


class TestLogprobs:
    def test_they_are_of_the_raw_logits(self) -> None:
        logits = random_logits(3)
        expected = logits.double().log_softmax(-1)
        values, best = logprobs(logits, [4, 0, 11], 3)
        assert values == pytest.approx([float(expected[0, 4]), float(expected[1, 0]), float(expected[2, 11])], abs=1e-5)
        for row, top in zip(expected, best, strict=True):
            assert [token for token, _ in top] == row.topk(3).indices.tolist()
            assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)

    def test_none_may_be_asked_for(self) -> None:
        values, best = logprobs(random_logits(2), [0, 1], 0)
        assert len(values) == 2
        assert best == [[], []]


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.999}, {"top_p": 0.5}, {"top_k": 700}, {"top_k": 700, "top_p": 0.99}, {"top_k": 40, "top_p": 0.9}, {}],
    ids=str,
)
def test_a_vocabulary_larger_than_the_first_look(options: dict[str, Any]) -> None:
    """Where the likeliest few are not enough to decide, all are looked at, row by row."""
    logits = (
        torch.randn(6, 3000, generator=torch.Generator().manual_seed(4)) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
    )
    params = SamplingParams(temperature=1.3, **options)
    state = SamplingState(params, [1], 3, 0, (), 3000, torch.device("cpu"))
    chosen = choose(logits, [RowGroup(state, index) for index in range(6)])
    for index, row in enumerate(logits):
        expected, margin = reference_choice(row, params, 1, [1], (), state.key(index))
        assert margin > 1e-6
        assert chosen[index] == [expected]


def test_a_neighbour_that_truncates_costs_a_plain_row_no_look_at_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without top_k and top_p keeps everything, and is never sorted for that."""
    probs = torch.randn(4, 3000, generator=torch.Generator().manual_seed(4)).softmax(-1)
    params = [SamplingParams(), SamplingParams(top_p=0.1), SamplingParams(min_p=0.5), SamplingParams(top_k=3)]
    slow = 0
    head_of = sampling._head_of

    def count(best: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal slow
        slow += len(best) == 1
        return head_of(best, *args)

    monkeypatch.setattr(sampling, "_head_of", count)
    keep = sampling.survivors(probs, params)
    assert keep is not None
    assert slow == 0
    assert keep[0].all()
    assert keep[3].sum() == 3
    assert torch.equal(keep[2], probs[2] >= probs[2].max() * 0.5)
