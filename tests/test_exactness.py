"""The promise: no drafter, batch or load changes a token."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support_engine import IdentityDrafter, run_dry, tokens_of, write_adapter, write_checkpoint
from support_exactness import MODES, Answers, assert_exact, reference_answers, requests

from skippy.engine import Engine, EngineConfig, Request, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return reference_answers(folder)


def test_every_drafter_and_mode_emits_what_the_reference_emits(folder: Path, answers: Answers) -> None:
    tallies = assert_exact(folder, answers)
    assert tallies["none"].drafted == 0
    assert tallies["wrong"].drafted > 100
    assert tallies["wrong"].accepted < tallies["wrong"].drafted // 10
    for name in ("oracle", "identity"):
        assert tallies[name].accepted == tallies[name].drafted > 100
    for name in ("ngram", "suffix", "recycling", "s3d", "hybrid", "random", "off-by-one"):
        assert 0 < tallies[name].accepted < tallies[name].drafted


@pytest.mark.parametrize(
    "config",
    [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 9, "max_num_seqs": 3},
        {"kv_cache_memory_bytes": 12 * 16 * 3 * 2 * 32 * 4},
    ],
    ids=["no prefix cache", "chunked prompts", "preemption"],
)
def test_neither_cache_nor_chunks_nor_preemption_change_a_token(
    folder: Path, answers: Answers, config: dict[str, Any]
) -> None:
    tallies = assert_exact(folder, answers, ("none", "random", "s3d"), **config)
    for name in ("random", "s3d"):
        assert tallies[name].accepted > 0
        if "kv_cache_memory_bytes" in config:
            assert tallies[name].preemptions > 0
        if "max_num_batched_tokens" in config:
            # In each mode four prompts one by one, then four in two steps, if none came in chunks.
            assert tallies[name].prefill_chunks > 6 * len(MODES)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_prefix_caching": False, "share_drafts": False},
        {"max_num_batched_tokens": 9, "max_num_seqs": 3},
        {"kv_cache_memory_bytes": 12 * 16 * 3 * 2 * 32 * 4},
    ],
    ids=["default", "nothing shared", "chunked prompts", "preemption"],
)
def test_without_an_adapter_no_token_changes_either(answers: Answers, config: dict[str, Any], tmp_path: Path) -> None:
    drafters = ("none", "suffix") if "share_drafts" in config else ("none", "suffix", "recycling", "hybrid")
    tallies = assert_exact(write_checkpoint(tmp_path), answers, drafters, **config)
    for name in drafters[1:]:
        assert 0 < tallies[name].accepted < tallies[name].drafted
        if "kv_cache_memory_bytes" in config:
            assert tallies[name].preemptions > 0


@pytest.mark.parametrize("drafter", ["suffix", "recycling", "hybrid"])
def test_aborts_leave_the_others_as_they_are(answers: Answers, drafter: str, tmp_path: Path) -> None:
    """Somebody leaves at every step, one choice of two among them; who stays gets the same tokens."""
    engine = Engine(EngineConfig(model=str(write_checkpoint(tmp_path)), device="cpu", dtype="float32", block_size=16))
    for leave in range(0, 12, 2):
        tokens: dict[tuple[str, int], list[int]] = {}
        for request in requests(MODES["greedy"], drafter):
            engine.add(request)
        for step in count():
            if step == leave:
                engine.abort("0")
                engine.abort("1", 0)
            if not engine.has_work:
                break
            for part in engine.step().outputs:
                tokens.setdefault((part.request_id, part.index), []).extend(part.token_ids)
        engine.check()
        for choice in (("1", 1), ("2", 0), ("3", 0)):
            assert tokens[choice] == answers["greedy"][choice]


PYTHON = "def fibonacci(n):\n    if n < 2:\n        return n\n    return "


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24, temperature=0.0),
        SamplingParams(max_tokens=24, temperature=0.8, seed=5, top_p=0.95, min_p=0.01, frequency_penalty=0.2),
    ],
    ids=["greedy", "sampled"],
)
def test_the_builtin_model_in_every_dtype(dtype: str, params: SamplingParams) -> None:
    engine = Engine(EngineConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    engine.add_drafter(IdentityDrafter(engine))
    text = PYTHON.encode()
    prompts = [tuple(4 + byte for byte in text[:size]) for size in (5, 17, 33, len(text))]

    def run(drafter: str, at_once: int, width: int) -> dict[tuple[str, int], list[int]]:
        outputs = run_dry(
            engine,
            [
                Request(str(i), prompt, params, drafter=drafter, num_speculative_tokens=width)
                for i, prompt in enumerate(prompts)
            ],
            at_once,
        )
        counts = [parts[-1].counts for parts in outputs.values()]
        if drafter == "identity":
            assert sum(c.accepted for c in counts) == sum(c.drafted for c in counts) > 30
        return tokens_of(outputs)

    plain = run("none", 1, 0)
    assert all(plain.values())
    for drafter, at_once, width in [
        ("none", 4, 0),
        ("ngram", 1, 5),
        ("ngram", 4, 15),
        ("suffix", 4, 16),
        ("recycling", 4, 8),
        ("identity", 1, 1),
        ("identity", 4, 1),
    ]:
        assert run(drafter, at_once, width) == plain, f"{drafter}, {at_once} at once, {width} drafted"
