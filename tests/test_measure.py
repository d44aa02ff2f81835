"""Decoding that is measured: its counts, its loops, and what its record names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from support_engine import EchoDrafter, write_checkpoint

from skippy.engine import EngineConfig, SamplingParams
from skippy.engine.engine import Engine
from skippy.engine.measure import decode, is_looping, sha256_of


def test_drafts_are_counted_by_depth(tmp_path: Path) -> None:
    """Against the stats of the steps, which count the same things elsewhere."""
    engine = Engine(EngineConfig(model=str(write_checkpoint(tmp_path)), enable_prefix_caching=False))
    engine.add_drafter(EchoDrafter())
    seen = []
    step = engine.step
    engine.step = lambda: seen.append(step()) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    run = decode(engine, [(7, 8, 7, 8), (9,)], "echo", 2, params, 3)
    assert run.drafts == sum(s.stats.drafts for s in seen) > 0
    assert sum(run.drafts_by_depth) == sum(s.stats.draft_tokens for s in seen)
    assert sum(run.accepted_by_depth) == sum(s.stats.accepted_tokens for s in seen) > 0
    assert run.drafts_by_depth == sorted(run.drafts_by_depth, reverse=True)
    assert run.steps == sum(s.stats.decode_sequences for s in seen)
    assert run.tokens == 80
    assert run.drafts_by_depth[0] == run.drafts


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [([], False), ([1, 2, 3], False), ([1] * 40, True), (list(range(40)), False), ([1, 2, 3, 4] * 10, True)],
)
def test_looping(tokens: list[int], looping: bool) -> None:
    assert is_looping(tokens) is looping


@pytest.mark.parametrize(("distinct", "looping"), [(8, False), (7, True)])
def test_looping_is_fewer_than_four_in_five_distinct_4_grams(distinct: int, looping: bool) -> None:
    # Ten 4-grams: those of a run of new tokens, then the same one again and again.
    tokens = [*range(distinct - 1), *[99] * (13 - (distinct - 1))]
    grams = {tuple(tokens[i : i + 4]) for i in range(10)}
    assert (len(tokens), len(grams)) == (13, distinct)
    assert is_looping(tokens) is looping


def test_several_files_are_hashed_as_one(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode() * 3_000_000)
    assert sha256_of(files) == hashlib.sha256(b"a" * 3_000_000 + b"b" * 3_000_000).hexdigest()
