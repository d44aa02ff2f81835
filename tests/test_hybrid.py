"""Lookup first, the model's own drafts where nothing is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_engine import run_dry, tokens_of, write_adapter, write_checkpoint
from support_exactness import requests

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.drafters.hybrid import LOOKUP_WIDTH, MIN_MATCH, HybridDrafter
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.sequence import Sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(base)
    return base


def sequence(*tokens: int, adaptive: bool = False) -> Sequence:
    request = Request("r", tokens, SamplingParams(max_tokens=20))
    return Sequence(
        request=request,
        index=0,
        seed=0,
        drafter="hybrid",
        max_draft=4,
        adaptive=adaptive,
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


def test_the_controller_limits_what_is_not_looked_up() -> None:
    repeating = sequence(*range(1, MIN_MATCH + 3), *range(1, MIN_MATCH + 1), adaptive=True)
    other, fixed = sequence(5, 6, 7, adaptive=True), sequence(5, 6, 7)
    told = Told()
    hybrid = HybridDrafter(told)
    hybrid.paid_width = 2
    drafts = hybrid.propose([repeating, other, fixed], [5, 5, 5])
    assert list(map(len, drafts)) == [5, 1, 1]
    assert [limit for _, limit in told.asked] == [2, 5]
    assert hybrid.free == {repeating}


@pytest.mark.parametrize("found", [False, True])
def test_its_controller_is_shown_passes_only(folder: Path, monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16))
    seen: list[tuple[int, int, int]] = []

    def width(batch: int) -> int:
        assert batch == 1
        return 3

    def observe(batch: int, width: int, seconds: float, accepted: list[int], others: int) -> None:
        assert seconds > 0.0
        assert len(accepted) == batch
        seen.append((batch, width, others))

    monkeypatch.setattr("skippy.engine.drafters.hybrid.lookup", lambda _, limit, __: [1] * limit if found else [])
    monkeypatch.setattr(engine._controllers["hybrid"], "width", width)
    monkeypatch.setattr(engine._controllers["hybrid"], "observe", observe)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add(Request("0", (3, 4, 5), params, drafter="hybrid"))
    widest = 0
    while engine.has_work:
        widest = max(widest, engine.step().stats.draft_tokens)
    # The last step has no room for a draft, so nothing can be looked up.
    assert seen[:-1] == [] if found else {(1, 3, 0)} <= set(seen)
    assert widest == LOOKUP_WIDTH if found else widest <= 3


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
