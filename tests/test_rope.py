"""Rotary tables; what they do to a model is tested in test_model.py and test_families.py."""

from __future__ import annotations

import torch
from support_engine import TINY_CONFIG

from skippy.engine.families import parse_config
from skippy.engine.rope import rope_tables


def test_rotary_tables_turn_nothing_at_position_nought() -> None:
    config = parse_config(TINY_CONFIG)
    cos, sin = rope_tables(config, config.rope_parameters, 16, torch.float32, torch.device("cpu"))
    assert cos.shape == sin.shape == (16, 1, config.head_dim)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
