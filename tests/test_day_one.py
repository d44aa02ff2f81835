"""The prompts of the first day, where their data is at hand, and what counts as a repetition."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))

from day_one import IDS, bare_copy, repeated_share, texts

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig

DATA = Path(__file__).parents[2] / "shared" / "data"


def test_no_prompt_is_named_twice() -> None:
    ids = json.loads(IDS.read_text(encoding="utf-8"))
    assert list(ids) == ["edit", "summarization", "qa", "rag"]
    assert all(len(set(named)) == len(named) >= 10 for named in ids.values())


@pytest.mark.skipif(not DATA.is_dir(), reason="the prompts' data is not at hand")
def test_prompts_are_built_of_the_ids() -> None:
    prompts = texts(DATA)
    ids = json.loads(IDS.read_text(encoding="utf-8"))
    assert {kind: len(texts) for kind, texts in prompts.items()} == {kind: len(named) for kind, named in ids.items()}
    first = prompts["edit"][0]
    assert first.count("def has_close_elements(") == first.count("def has_close_elements_v2(") == 1
    assert first.count("return False") == 1, "the second time the body is left to the model"


@pytest.mark.parametrize(
    ("prompt", "output", "share"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], 0.25),
        ([9], [1, 2, 3, 4, 1, 2, 3, 4, 1], 2 / 7),
        ([1] * 8, [1] * 8, 1.0),
        ([1, 2, 3], [4, 5, 6], 0.0),
    ],
)
def test_the_share_of_what_occurred_before(prompt: list[int], output: list[int], share: float) -> None:
    assert repeated_share(prompt, output) == pytest.approx(share)


def test_a_bare_copy_has_no_adapter(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(model=bare_copy(BUILTIN_MODEL, tmp_path), device="cpu"))
    assert (engine.info.drafter, "s3d" in engine.info.drafters) == ("hybrid", False)
