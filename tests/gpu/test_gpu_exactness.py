"""Exactness on a GPU: every drafter and batch size emits the same tokens in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_engine import IdentityDrafter, OracleDrafter, RandomDrafter, run_dry, tokens_of
from support_families import tiny, write_family

from skippy.engine import Engine, EngineConfig, Request, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [tuple(4 + byte for byte in text.encode()) for text in ("def f(x):\n", "import os\n\n", "class A:\n    def ")]
MODES = [
    SamplingParams(max_tokens=48, temperature=0.0, seed=0),
    SamplingParams(max_tokens=48, temperature=0.8, seed=5, top_p=0.95, min_p=0.01, frequency_penalty=0.2),
]


@pytest.mark.parametrize("params", MODES, ids=["greedy", "sampled"])
def test_no_drafter_and_no_batch_changes_a_token(params: SamplingParams) -> None:
    engine = Engine(EngineConfig(device="cuda", dtype="float32"))

    def run(drafter: str, at_once: int) -> dict[tuple[str, int], list[int]]:
        requests = [Request(str(i), prompt, params, drafter=drafter) for i, prompt in enumerate(PROMPTS)]
        return tokens_of(run_dry(engine, requests, at_once))

    plain = run("none", 1)
    engine.add_drafter(OracleDrafter(plain))
    engine.add_drafter(RandomDrafter(plain, engine.info.vocab_size))
    engine.add_drafter(IdentityDrafter(engine))
    for drafter in ("none", "ngram", "oracle", "random", "identity"):
        for at_once in (1, len(PROMPTS)):
            assert run(drafter, at_once) == plain, f"{drafter}, {at_once} at once"


def test_the_gpu_agrees_with_the_cpu() -> None:
    params = MODES[0]
    outputs = [
        tokens_of(
            run_dry(
                Engine(EngineConfig(device=device, dtype="float32")),
                [Request(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)],
            )
        )
        for device in ("cpu", "cuda")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("name", ["Qwen3-8B", "Gemma-3-4B"])
def test_families_agree_with_the_cpu(name: str, tmp_path: Path) -> None:
    write_family(tmp_path, tiny(name, max_position_embeddings=256, num_hidden_layers=3))
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    outputs = [
        tokens_of(run_dry(Engine(EngineConfig(model=str(tmp_path), device=device, dtype="float32")), [request]))
        for device in ("cpu", "cuda")
        for request in [Request("r", (3, 4, 5, 6), params)]
    ]
    assert outputs[0] == outputs[1]
