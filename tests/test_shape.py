"""Which layers a pass runs through."""

from __future__ import annotations

import pytest
from support_engine import TINY_CONFIG

from skippy.engine.families import parse_config
from skippy.engine.shape import full_plan, skipping_plan

CONFIG = parse_config({**TINY_CONFIG, "num_hidden_layers": 6})


def test_the_verifier_runs_every_layer_in_order() -> None:
    assert list(full_plan(CONFIG)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("start", "end", "kept"), [(2, 4, [0, 1, 4, 5]), (0, 5, [5]), (1, 1, [0, 1, 2, 3, 4, 5]), (3, 6, [0, 1, 2])]
)
def test_a_skip_band_leaves_out_its_layers(start: int, end: int, kept: list[int]) -> None:
    assert list(skipping_plan(CONFIG, start, end)) == kept
