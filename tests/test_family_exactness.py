"""The promise for every family: no drafter, batch or load changes a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_engine import IdentityDrafter, run_dry, tokens_of, write_adapter
from support_exactness import MODES, assert_exact, plain_answers, reference_answers, requests
from support_families import tiny, write_family

from skippy.engine import Engine, EngineConfig
from skippy.engine.config import Quantization

MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# One of every shape: the others differ from these in names and numbers alone.
SHAPES: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {},
    "Qwen2.5-7B with YaRN": {},
    "Qwen3-8B": {},
    "Phi-4-mini": {},
    "Gemma-2-9B": {},
    "Gemma-3-4B": MIXED,
    "Olmo-3-7B": MIXED,
    "SmolLM3-3B": {"no_rope_layers": [1, 0, 1]},
    "Granite-3.3-2B": {},
    "EXAONE-4.0-32B": MIXED,
}
WANTED = ("greedy", "everything")
DRAFTERS = ("none", "ngram", "suffix", "recycling", "s3d", "hybrid", "random")
"""Those that are served and need no head of their own, and one that is right at times."""


@pytest.mark.parametrize("name", SHAPES)
def test_every_drafter_emits_what_the_reference_emits(name: str, tmp_path: Path) -> None:
    write_family(tmp_path, tiny(name, max_position_embeddings=256, num_hidden_layers=3, **SHAPES[name]))
    write_adapter(tmp_path)
    answers = reference_answers(tmp_path, WANTED)
    assert_exact(tmp_path, answers, ("none", "s3d", "random"), ("greedy",), widths=(4, 1, 6, 3))
    tallies = assert_exact(tmp_path, answers, DRAFTERS, ("everything",), widths=(4, 1, 6, 3))
    for drafter in ("s3d", "random"):
        assert 0 < tallies[drafter].accepted < tallies[drafter].drafted


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", SHAPES)
def test_quantised_drafters_emit_what_plain_decoding_does(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    write_family(tmp_path, tiny(name, max_position_embeddings=256, num_hidden_layers=3, **SHAPES[name]))
    write_adapter(tmp_path)
    answers = plain_answers(tmp_path, ("everything",), quantization)
    tallies = assert_exact(
        tmp_path, answers, ("none", "s3d", "hybrid"), ("everything",), widths=(4, 1, 6, 3), quantization=quantization
    )
    assert 0 < tallies["s3d"].accepted < tallies["s3d"].drafted


@pytest.mark.parametrize("name", ["Gemma-2-9B", "Gemma-3-4B", "Olmo-3-7B"])
def test_bfloat16_depends_on_no_drafter_and_no_batch(name: str, tmp_path: Path) -> None:
    write_family(tmp_path, tiny(name, max_position_embeddings=256, num_hidden_layers=3, **SHAPES[name]))
    engine = Engine(EngineConfig(model=str(tmp_path), device="cpu", dtype="bfloat16", block_size=16))
    engine.add_drafter(IdentityDrafter(engine))
    params = MODES["everything"]

    def run(drafter: str, at_once: int) -> dict[tuple[str, int], list[int]]:
        return tokens_of(run_dry(engine, requests(params, drafter), at_once))

    plain = run("none", 1)
    for drafter, at_once in (("none", 4), ("ngram", 4), ("identity", 1), ("identity", 4)):
        assert run(drafter, at_once) == plain, f"{drafter}, {at_once} at once"
