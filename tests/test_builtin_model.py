"""The model that is shipped: its shape and size, and its card."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.hub import find_model
from skippy.engine.measure import LOOPING_BELOW, decode, distinct_grams
from skippy.engine.weights import open_checkpoint

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))
from baseline import BareLoop
from stories import STORIES

FOLDER = find_model(BUILTIN_MODEL)


def test_it_is_deep_and_small() -> None:
    checkpoint = open_checkpoint(BUILTIN_MODEL)
    assert checkpoint.config.num_hidden_layers >= 10
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 40 * 2**20


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "s3d/adapter.safetensors"])
def test_its_card_names_the_files(name: str) -> None:
    digest = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
    card = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    found = re.search(rf"`{re.escape(name)}` (?:begins )?with `([0-9a-f]{{16}})`", card)
    assert found is not None
    assert digest.startswith(found[1])


def test_its_stories_go_on_and_do_not_loop() -> None:
    """Here all of them do not; another processor may round a choice the other way."""
    engine = Engine(EngineConfig(drafter="none", device="cpu"))
    tokenizer = Tokenizer.load(engine.info.model_path)
    prompts = [tuple(tokenizer.encode(opening)) for opening in STORIES]
    params = SamplingParams(max_tokens=120, temperature=0.0, seed=0)
    written = decode(engine, prompts, "none", len(prompts), params).outputs
    assert sum(distinct_grams(tokens) >= LOOPING_BELOW for tokens in written) >= 18
    assert sum(len(tokens) >= 32 for tokens in written) >= 18


def test_the_bare_loop_that_the_engine_is_timed_against_says_the_same() -> None:
    engine = Engine(EngineConfig(drafter="none", device="cpu"))
    prompt = tuple(Tokenizer.load(engine.info.model_path).encode(STORIES[0]))
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    assert decode(engine, [prompt], "none", 1, params).outputs == [BareLoop(engine).generate(prompt, 12)]
