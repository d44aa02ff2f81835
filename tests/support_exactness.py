"""The equality that everything else rests on, as one function, so that mutations can be held against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from support_engine import (
    IdentityDrafter,
    OffByOneDrafter,
    OracleDrafter,
    RandomDrafter,
    WrongDrafter,
    run_dry,
    tokens_of,
)

from skippy.engine import Engine, EngineConfig, Request, SamplingParams, StepStats
from skippy.engine.config import Quantization
from skippy.engine.model import CausalLM
from skippy.engine.quant import pack_as
from skippy.engine.reference import reference_generate
from skippy.engine.weights import Checkpoint, load_model, open_checkpoint

MAX_TOKENS = 24
MODES: dict[str, SamplingParams] = {
    "greedy": SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, seed=0),
    "greedy penalised": SamplingParams(
        max_tokens=MAX_TOKENS,
        seed=0,
        temperature=0.0,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        min_tokens=9,
    ),
    "plain sampling": SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=1),
    "truncated": SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=2, top_k=20, top_p=0.9, min_p=0.02),
    "everything": SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=0.8,
        seed=-3,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=0.3,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={5: 2.0, 7: -100.0, 11: 1.0},
        min_tokens=6,
        stop_token_ids=(13, 17),
    ),
}
PROMPTS = ((1, 5, 9, 5, 9, 5, 9, 5), (1, 40, 41, 42), tuple(range(3, 80)), (8,))
NEAR_TIE = 1e-4


@dataclass
class Tally:
    """What the drafters of one run came to; a test of nothing would count nothing."""

    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    prefill_chunks: int = 0


def requests(params: SamplingParams, drafter: str, widths: Sequence[int] = (4,)) -> Iterator[Request]:
    """One for each of PROMPTS, drafting as many tokens as `widths` say in turn."""
    for i, prompt in enumerate(PROMPTS):
        width = widths[i % len(widths)]
        yield Request(str(i), prompt, params, n=2 if i == 1 else 1, drafter=drafter, num_speculative_tokens=width)


Answers = dict[str, dict[tuple[str, int], list[int]]]


def naive_model(checkpoint: Checkpoint, quantization: Quantization = "none") -> CausalLM:
    """What the naive reference runs: packed only if it is quantised."""
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), checkpoint.config.max_position_embeddings)
    if quantization != "none":
        model.pack(checkpoint.vocab_size, pack_layers=pack_as(quantization))
    return model


def reference_answers(folder: Path, modes: Sequence[str] = tuple(MODES)) -> Answers:
    """What the naive reference emits, by mode and choice; none of it by a near tie."""
    checkpoint = open_checkpoint(str(folder))
    naive = naive_model(checkpoint)
    answers: Answers = {}
    for mode in modes:
        params = MODES[mode]
        answers[mode] = {}
        for request in requests(params, "none"):
            for index in range(request.n):
                tokens, margins = reference_generate(
                    naive, request.prompt_token_ids, params, checkpoint.eos_token_ids, index
                )
                assert min(margins) > NEAR_TIE, f"{mode}: choose another seed, the reference is near a tie"
                answers[mode][request.request_id, index] = tokens
    return answers


def plain_answers(folder: Path, modes: Sequence[str], quantization: Quantization) -> Answers:
    """What an engine emits without drafts, one request at a time."""
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", quantization=quantization)
    return {mode: tokens_of(run_dry(Engine(config), requests(MODES[mode], "none"), 1)) for mode in modes}


DRAFTERS = (
    "none",
    "ngram",
    "suffix",
    "recycling",
    "s3d",
    "hybrid",
    "oracle",
    "wrong",
    "off-by-one",
    "random",
    "identity",
)


def assert_exact(
    folder: Path,
    answers: Answers,
    drafters: Sequence[str] = DRAFTERS,
    modes: Sequence[str] = tuple(MODES),
    widths: Sequence[int] = (4,),
    **config: object,
) -> dict[str, Tally]:
    """Every drafter, mode and batch size emits the answers; returns a tally per drafter.

    Args:
        folder: a model with an adapter beside it, if s3d is one of the drafters.
        widths: how many tokens to draft for the requests, in turn.

    Raises:
        AssertionError: some token differs.
    """
    sizes: dict[str, object] = {"block_size": 16, **config}
    engine = Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", **sizes))  # type: ignore[arg-type]
    tallies: dict[str, Tally] = {}
    for mode in modes:
        params, expected = MODES[mode], answers[mode]
        add_drafters(engine, expected)
        for drafter in drafters:
            for at_once in (1, len(PROMPTS)):
                steps: list[StepStats] = []
                outputs = run_dry(engine, requests(params, drafter, widths), at_once, steps.append)
                assert tokens_of(outputs) == expected, f"{mode}, {drafter}, {at_once} at once: tokens differ"
                tally = tallies.setdefault(drafter, Tally())
                tally.preemptions += sum(step.preemptions for step in steps)
                tally.prefill_chunks += sum(step.prompt_tokens > 0 for step in steps)
                for parts in outputs.values():
                    tally.drafted += parts[-1].counts.drafted
                    tally.accepted += parts[-1].counts.accepted
    return tallies


def add_drafters(engine: Engine, answers: dict[tuple[str, int], list[int]]) -> None:
    """Give an engine the drafters of the tests; `answers` is what plain decoding emits."""
    engine.add_drafter(OracleDrafter(answers))
    engine.add_drafter(WrongDrafter(answers))
    engine.add_drafter(OffByOneDrafter(answers))
    engine.add_drafter(RandomDrafter(answers, engine.info.vocab_size))
    engine.add_drafter(IdentityDrafter(engine))
