"""The adapter that is shipped: its size, its base, and what it was not trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from skippy.engine import Engine, EngineConfig, Request, SamplingParams, Tokenizer
from skippy.engine.adapter_files import fingerprint
from skippy.engine.config import BUILTIN_MODEL
from skippy.engine.hub import find_model
from skippy.engine.weights import open_checkpoint

TESTS = Path(__file__).parent
HUMANEVAL = TESTS.parents[1] / "shared" / "data" / "HumanEval.jsonl"
ADAPTER = find_model(BUILTIN_MODEL) / "s3d"


@pytest.fixture(scope="module")
def records() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_grams", TESTS / "benchmarks" / "training_grams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_at_most_a_tenth_of_its_base() -> None:
    base = (ADAPTER.parent / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) <= base / 10


def test_it_belongs_to_the_model_that_is_shipped_with_it() -> None:
    described = json.loads((ADAPTER / "adapter.json").read_text())
    assert described["base_fingerprint"] == fingerprint(open_checkpoint(BUILTIN_MODEL))


def test_hashes_come_back_as_they_were_written(records: ModuleType, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(2000))
    hashes = records.gram_hashes([text])
    records.write_hashes(tmp_path / "grams.xz", hashes)
    assert records.read_hashes(tmp_path / "grams.xz") == hashes
    assert len(hashes) == 2000 - 12
    assert records.gram_hashes([text.upper()]) == hashes


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval.jsonl is not there")
def test_no_13_words_of_an_evaluation_text_were_trained_on(records: ModuleType) -> None:
    trained = records.read_hashes(TESTS / "data" / "builtin_s3d_grams.xz")
    assert len(trained) > 100_000
    entries = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
    texts = [entry["prompt"] + entry["canonical_solution"] for entry in entries]
    evaluated = records.gram_hashes(texts)
    assert len(evaluated) > 10_000
    assert not trained & evaluated


def test_it_drafts_by_default_and_well() -> None:
    engine = Engine(EngineConfig(device="cpu"))
    assert engine.info.drafter == "hybrid"
    tokenizer = Tokenizer.load(engine.info.model_path)
    prompt = tuple(tokenizer.encode("def parse_line(line):\n    "))
    params = SamplingParams(max_tokens=96, temperature=0.8, seed=0, ignore_eos=True)
    engine.add(Request("r", prompt, params, drafter="s3d", num_speculative_tokens=6))
    while engine.has_work:
        for output in engine.step().outputs:
            counts = output.counts
    assert 96 / counts.steps > 1.6
