"""Lookup first, the model's own drafts where nothing is found."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
from support_engine import run_dry, tokens_of, write_adapter, write_checkpoint
from support_exactness import requests

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.drafters.suffix import SuffixDrafter
from skippy.engine.sequence import Sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(base)
    return base


def sequence(*tokens: int) -> Sequence:
    request = Request("r", tokens, SamplingParams(max_tokens=20))
    return Sequence(
        request=request,
        index=0,
        seed=0,
        drafter="hybrid",
        max_draft=4,
        adaptive=False,
        end_ids=frozenset(),
        tokens=list(tokens),
    )


class Told:
    """Says what it was asked, and has one token for everybody."""

    name = "told"

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.released: list[Sequence] = []

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        self.asked += [(s.tokens, limit) for s, limit in zip(sequences, limits, strict=True)]
        return [[90 + place] for place in range(len(sequences))]

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)


class Silent(Told):
    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [[] for _ in super().propose(sequences, limits)]


REPEATING = (*range(1, 9), *range(1, 7))


def test_the_other_drafts_only_where_nothing_repeats() -> None:
    repeating, other, third = sequence(*REPEATING), sequence(5, 6, 7), sequence(8, 9)
    told = Told()
    drafts = HybridDrafter(SuffixDrafter(None), told).propose([other, repeating, third], [4, 2, 3])
    assert drafts == [[90], [7, 8], [91]]
    assert told.asked == [(other.tokens, 4), (third.tokens, 3)]


def test_what_promises_less_than_the_others_drafts_came_to_is_not_taken() -> None:
    told = Told()
    hybrid, other = HybridDrafter(SuffixDrafter(None), told), sequence(5, 6, 7)
    repeating = sequence(*REPEATING)
    for accepted in [5] * 100:
        hybrid.propose([other], [4])
        other.last_accepted = accepted
    assert hybrid.propose([repeating], [4]) == [[90]]
    for accepted in [0] * 300:
        hybrid.propose([other], [4])
        other.last_accepted = accepted
    assert hybrid.propose([repeating], [4])[0][:2] == [7, 8]


def test_a_weak_lookup_is_better_than_nothing() -> None:
    silent = Silent()
    hybrid = HybridDrafter(SuffixDrafter(None), silent)
    hybrid._accepted = 100.0
    repeating = sequence(*REPEATING)
    assert hybrid.propose([repeating], [2]) == [[7, 8]]
    assert silent.asked == [(repeating.tokens, 2)]


def test_both_forget_what_has_ended() -> None:
    told = Told()
    lookup = SuffixDrafter(None)
    hybrid, one = HybridDrafter(lookup, told), sequence(5, 6, 7)
    hybrid.propose([one], [4])
    hybrid.release(one)
    assert told.released == [one]
    assert (hybrid._asked, lookup._own) == (set(), {})


def test_sequences_of_every_drafter_share_a_batch(folder: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, seed=0)
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16))
    expected = tokens_of(run_dry(engine, requests(params, "none")))
    mixed = [
        Request(f"{drafter} {request.request_id}", request.prompt_token_ids, params, n=request.n, drafter=drafter)
        for drafter in ("none", "ngram", "suffix", "recycling", "s3d", "hybrid")
        for request in requests(params, drafter)
    ]
    for (name, index), tokens in tokens_of(run_dry(engine, mixed)).items():
        assert tokens == expected[name.split()[1], index]
