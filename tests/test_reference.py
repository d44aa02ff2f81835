"""The naive oracle, and the engine against it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support_engine import run_dry, tokens_of, write_checkpoint

from skippy.engine import Engine, EngineConfig, Request, SamplingParams
from skippy.engine.model import CausalLM
from skippy.engine.reference import reference_choice, reference_generate, reference_logits
from skippy.engine.weights import load_model, open_checkpoint

PROMPTS = [(1, 5, 9, 5, 9, 5), (40,), tuple(range(3, 60)), (8, 8, 8, 8)]
NEAR_TIE = 1e-4
"""Below this margin rounding may decide, and float32 results of two programs may differ."""

OPTIONS = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0, seed=1),
    "sampled": SamplingParams(max_tokens=24, seed=2),
    "everything": SamplingParams(
        max_tokens=24,
        temperature=0.8,
        top_p=0.95,
        top_k=40,
        min_p=0.02,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={7: 1.5, 11: -2.0},
        min_tokens=6,
        stop_token_ids=(13,),
        seed=3,
    ),
    "beyond the end": SamplingParams(max_tokens=40, temperature=1.5, ignore_eos=True, seed=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"), 256)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=8))
    yield engine
    engine.check()


@pytest.mark.parametrize("params", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_engine_emits_what_the_reference_does(engine: Engine, model: CausalLM, params: SamplingParams) -> None:
    requests = [Request(str(i), prompt, params, n=2) for i, prompt in enumerate(PROMPTS)]
    emitted = tokens_of(run_dry(engine, requests))
    assert len(emitted) == 2 * len(PROMPTS)
    for (name, choice), tokens in emitted.items():
        expected, margins = reference_generate(model, PROMPTS[int(name)], params, [2], choice)
        if tokens != expected:
            place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
            assert margins[place] < NEAR_TIE, f"prompt {name}, choice {choice}, token {place}"


class TestReference:
    def test_every_position_sees_its_past_alone(self, model: CausalLM) -> None:
        tokens = list(PROMPTS[2])
        whole = reference_logits(model, tokens)
        torch.testing.assert_close(reference_logits(model, tokens[:20]), whole[:20], rtol=0, atol=1e-5)
        changed = reference_logits(model, [*tokens[:20], 90, *tokens[21:]])
        torch.testing.assert_close(changed[:20], whole[:20], rtol=0, atol=1e-5)
        assert not torch.allclose(changed[20:], whole[20:], atol=1e-2)

    def test_a_margin_says_by_how_much_a_token_won(self) -> None:
        logits = torch.tensor([0.5, 3.0, 2.25])
        assert reference_choice(logits, SamplingParams(temperature=0.0), 1, [0], (), 0) == (1, 0.75)

    def test_penalties_count_the_output_and_not_the_prompt(self) -> None:
        logits, params = torch.tensor([1.0, 1.5, 0.0]), SamplingParams(temperature=0.0, presence_penalty=1.0)
        assert reference_choice(logits, params, 2, [1, 1], (), 0)[0] == 1
        assert reference_choice(logits, params, 1, [1, 1], (), 0)[0] == 0

    def test_it_ends_with_an_end_or_with_the_last_token(self, model: CausalLM) -> None:
        params = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
        tokens, margins = reference_generate(model, PROMPTS[0], params, ())
        assert len(tokens) == len(margins) == 8
        shorter, _ = reference_generate(model, PROMPTS[0], params, {tokens[3]})
        assert shorter == tokens[: tokens.index(tokens[3]) + 1], "the end is part of the output"
        ignoring = SamplingParams(max_tokens=8, temperature=0.0, seed=0, ignore_eos=True)
        assert reference_generate(model, PROMPTS[0], ignoring, {tokens[3]})[0] == tokens
