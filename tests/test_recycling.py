"""The table of candidates, and drafts that follow it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skippy.engine.drafters import recycling
from skippy.engine.drafters.recycling import MAX_DRAFT, NUM_CANDIDATES, CandidateTable, RecyclingDrafter
from skippy.engine.sampling import RowGroup, SamplingState, choose
from skippy.engine.sequence import Sequence
from skippy.engine.types import Request, SamplingParams

VOCABULARY = 40
GREEDY = SamplingParams(max_tokens=50, temperature=0.0, seed=0)
SAMPLED = SamplingParams(max_tokens=50, temperature=0.8, seed=3)


@pytest.fixture(autouse=True)
def as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "MIN_REACH", 0.2)


def sequence_of(*tokens: int, params: SamplingParams = GREEDY) -> Sequence:
    return Sequence(Request("r", (1,), params), 0, 0, "recycling", 4, False, frozenset(), list(tokens))


def state_of(params: SamplingParams) -> SamplingState:
    assert params.seed is not None
    return SamplingState(params, (1,), params.seed, 0, (), VOCABULARY, torch.device("cpu"))


def drafter_for(*sequences: Sequence) -> RecyclingDrafter:
    return RecyclingDrafter(VOCABULARY, {sequence: state_of(sequence.params) for sequence in sequences})


def rows(*best: int, sure: float = 8.0) -> torch.Tensor:
    """Logits [len(best), VOCABULARY], each with its likeliest token."""
    logits = torch.randn(len(best), VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[range(len(best)), best] = sure
    return logits


class TestTable:
    @settings(derandomize=True, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=50))
    def test_it_is_a_dictionary_of_the_last_rows(self, puts: list[tuple[int, int]]) -> None:
        table, expected = CandidateTable(10, 3), {}
        for token, seed in puts:
            ids, logits = [seed, seed + 1, seed + 2], [seed * 1.0, -0.5, -1.0]
            table.put([token], [ids], [logits])
            expected[token] = (ids, logits)
        for token in range(10):
            got = table.get(token)
            assert (got and (list(got[0]), list(got[1]))) == expected.get(token)
        assert (len(table._ids), len(table._logits)) == (10 * 3, 10 * 3)

    def test_of_several_rows_of_a_token_the_last_one_stays(self) -> None:
        table = CandidateTable(4, 1)
        table.put([2, 2], [[0], [3]], [[1.0], [2.0]])
        got = table.get(2)
        assert got is not None
        assert list(got[0]) == [3]


class TestDrafts:
    def test_it_follows_the_likeliest_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recycling, "MIN_REACH", 0.0)
        sequence = sequence_of(1, 5)
        drafter = drafter_for(sequence)
        drafter.read([5, 6, 7], rows(6, 7, 8))
        assert drafter.propose([sequence], [9]) == [[6, 7, 8]]
        assert drafter.propose([sequence], [2]) == [[6, 7]]
        assert drafter.propose([sequence], [0]) == [[]]
        drafter.read([7], rows(5))
        assert drafter.propose([sequence], [100]) == [[6, 7, 5, 6, 7, 5, 6, 7][:MAX_DRAFT]]

    def test_nothing_is_drafted_after_an_unknown_token(self) -> None:
        sequence = sequence_of(1, 5)
        assert drafter_for(sequence).propose([sequence], [4]) == [[]]

    @pytest.mark.parametrize("params", [GREEDY, SAMPLED])
    @pytest.mark.parametrize("seed", range(10))
    def test_where_the_candidates_are_all_there_is_it_chooses_as_the_verifier(
        self, params: SamplingParams, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recycling, "MIN_REACH", 0.0)
        sequence = sequence_of(1, 5, params=params)
        drafter = drafter_for(sequence)
        logits = torch.full((VOCABULARY, VOCABULARY), -1e4)
        generator = torch.Generator().manual_seed(seed)
        for row in logits:
            row[torch.randperm(VOCABULARY, generator=generator)[:NUM_CANDIDATES]] = torch.randn(
                NUM_CANDIDATES, generator=generator
            )
        drafter.read(range(VOCABULARY), logits)
        (draft,) = drafter.propose([sequence], [MAX_DRAFT])
        assert len(draft) == MAX_DRAFT
        before = [5, *draft[:-1]]
        group = RowGroup(state_of(params), len(sequence.tokens), draft[:-1])
        assert choose(logits[before], [group]) == [draft]

    def test_it_stops_where_like_drafts_failed_and_starts_again(self) -> None:
        sequence = sequence_of(1, 5)
        drafter = drafter_for(sequence)
        drafter.read(range(10), rows(*range(1, 11)))
        assert drafter.propose([sequence], [8]) == [[6, 7]]
        for _ in range(10):
            drafter.propose([sequence], [8])
            sequence.tokens += [9, 5]
        assert drafter.propose([sequence], [8]) == [[]]
        for _ in range(10):
            sequence.tokens += [6, 7, 8, 5]
            sequence.tokens[-1:] = [5]
            drafter.propose([sequence], [8])
        assert drafter.propose([sequence], [8]) != [[]], "it went on guessing in silence"

    def test_what_has_ended_is_forgotten(self) -> None:
        sequence = sequence_of(1, 5)
        drafter = drafter_for(sequence)
        drafter.read([5], rows(6))
        drafter.propose([sequence], [4])
        drafter.release(sequence)
        assert drafter._calibration._open == {}


def test_a_vocabulary_smaller_than_the_candidates_will_do() -> None:
    drafter = RecyclingDrafter(3, {})
    drafter.read([1], torch.tensor([[0.0, 2.0, 1.0]]))
    got = drafter.table.get(1)
    assert got is not None
    assert list(got[0]) == [1, 2, 0]


def test_a_choice_is_as_clear_as_its_share() -> None:
    token, share = recycling._choose([7, 8], [math.log(3.0), 0.0], state_of(GREEDY), 0)
    assert token == 7
    assert share == pytest.approx(0.75)
