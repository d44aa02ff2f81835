"""The promise for every family: no drafter, batch or load changes a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_engine import write_adapter
from support_exactness import assert_exact, reference_answers
from support_families import tiny, write_family

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
MODES = ("greedy", "everything")


@pytest.mark.parametrize("name", SHAPES)
def test_every_drafter_emits_what_the_reference_emits(name: str, tmp_path: Path) -> None:
    write_family(tmp_path, tiny(name, max_position_embeddings=256, num_hidden_layers=3, **SHAPES[name]))
    write_adapter(tmp_path)
    answers = reference_answers(tmp_path, MODES)
    tallies = assert_exact(tmp_path, answers, ("none", "s3d", "random"), MODES, widths=(4, 1, 6, 3))
    for drafter in ("s3d", "random"):
        assert 0 < tallies[drafter].accepted < tallies[drafter].drafted
