"""The model that is shipped: its shape and size, its card, and that it does not run in circles."""

from __future__ import annotations

import hashlib
import re

import pytest

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.bench import decode, is_looping
from skippy.engine.hub import find_model
from skippy.engine.weights import open_checkpoint

FOLDER = find_model(BUILTIN_MODEL)
OPENINGS = (
    "Anna had a kite with a long blue tail. On a windy day she",
    "A farmer had a goat who loved to eat hats. Every day the goat",
    "Mom told Sam not to open the red box. Sam",
    "Ella did not want to share her new drum with her friend.",
)


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


def test_its_stories_do_not_loop() -> None:
    engine = Engine(EngineConfig(device="cpu", drafter="none"))
    tokenizer = Tokenizer.load(engine.info.model_path)
    prompts = [tuple(tokenizer.encode(opening)) for opening in OPENINGS]
    params = SamplingParams(max_tokens=160, temperature=0.0)
    stories = decode(engine, prompts, "none", len(prompts), params).outputs
    assert all(len(story) > 40 for story in stories)
    assert not any(is_looping(story) for story in stories)
