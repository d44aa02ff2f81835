"""The model that is shipped: its shape and size, and its card."""

from __future__ import annotations

import hashlib
import re

import pytest

from skippy.engine import BUILTIN_MODEL
from skippy.engine.hub import find_model
from skippy.engine.weights import open_checkpoint

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
