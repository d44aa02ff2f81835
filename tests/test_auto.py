"""What the log says about the drafter that was taken."""

from __future__ import annotations

import pytest

from skippy.engine.config import EngineConfig
from skippy.engine.drafters.auto import describe_choice, describe_learning, train_command


@pytest.mark.parametrize(
    ("chosen", "has_adapter", "expected", "advice"),
    [
        ("hybrid", True, "the model has an adapter", False),
        ("hybrid", False, "likeliest tokens of before", True),
        ("suffix", False, "what repeats is looked up; to train one, a day here: ", True),
    ],
)
def test_one_line_says_what_and_why(chosen: str, has_adapter: bool, expected: str, advice: bool) -> None:
    line = describe_choice(chosen, has_adapter, EngineConfig(model="my model"), lambda: "a day here")
    assert line.startswith(f"drafter {chosen}: ")
    assert expected in line
    assert ("skippy train 'my model' -o adapter" in line) == advice
    assert "\n" not in line


def test_the_model_is_trained_as_it_is_served() -> None:
    config = EngineConfig(model="owner/model", revision="v1.1", quantization="nf4", num_threads=3)
    assert train_command(config) == "skippy train owner/model -o adapter --revision v1.1 --quantization nf4"


@pytest.mark.parametrize(
    ("chosen", "expected"), [("hybrid", "what repeats is looked up"), ("s3d", "nothing is drafted")]
)
def test_nothing_is_learnt_yet(chosen: str, expected: str) -> None:
    assert describe_learning(chosen, "here") == f"drafter {chosen}: {expected} until an adapter is learnt in here"
