"""Lookup first, the model's own drafts where nothing is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_engine import run_dry, tokens_of, write_adapter, write_checkpoint
from support_exactness import requests

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.drafters.hybrid import MIN_MATCH, HybridDrafter
from skippy.engine.drafters.s3d import S3DDrafter
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


class Told(S3DDrafter):
    """Says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def propose(self, sequences, limits):  # type: ignore[no-untyped-def]
        self.asked += [(s.tokens, limit) for s, limit in zip(sequences, limits, strict=True)]
        return [[90 + place] for place in range(len(sequences))]


def test_the_model_drafts_only_where_nothing_long_repeats() -> None:
    repeating = sequence(*range(1, MIN_MATCH + 3), *range(1, MIN_MATCH + 1))
    short = sequence(1, 2, 3, 4, 1, 2, 3)
    other = sequence(5, 6, 7)
    told = Told()
    drafts = HybridDrafter(told).propose([short, repeating, other], [4, 2, 3])
    assert drafts == [[90], [MIN_MATCH + 1, MIN_MATCH + 2], [91]]
    assert told.asked == [(short.tokens, 4), (other.tokens, 3)]


def test_lookups_that_fail_must_be_longer_the_next_time() -> None:
    repeating = sequence(*range(1, MIN_MATCH + 3), *range(1, MIN_MATCH + 1))
    repeating.misses = 1
    told = Told()
    assert HybridDrafter(told).propose([repeating], [4]) == [[90]]


def test_sequences_of_every_drafter_share_a_batch(folder: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, seed=0)
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16))
    expected = tokens_of(run_dry(engine, requests(params, "none")))
    mixed = [
        Request(f"{drafter} {request.request_id}", request.prompt_token_ids, params, n=request.n, drafter=drafter)
        for drafter in ("none", "ngram", "s3d", "hybrid")
        for request in requests(params, drafter)
    ]
    for (name, index), tokens in tokens_of(run_dry(engine, mixed)).items():
        assert tokens == expected[name.split()[1], index]
