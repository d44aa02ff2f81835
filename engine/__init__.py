"""Skippy's inference engine. Import it as `skippy.engine`; it knows nothing of HTTP.

The names below are the public ones. Those that need torch are loaded on first use, so
that the server process can import this package without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "skippy.engine":
    raise ImportError(f"import this package as 'skippy.engine', not as {__name__!r}")

from skippy.engine.admission import check_request
from skippy.engine.config import BUILTIN_MODEL, Device, Dtype, EngineConfig, Quantization
from skippy.engine.errors import CheckpointError, ConfigError, EngineDead, InvalidRequest, SkippyError
from skippy.engine.prompts import read_prompts
from skippy.engine.tokenizer import Tokenizer
from skippy.engine.types import (
    DraftCounts,
    EngineInfo,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    StepStats,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from skippy.engine.bench import BenchOptions, run_bench
    from skippy.engine.engine import Engine
    from skippy.engine.plan import PlanOptions, run_plan
    from skippy.engine.training.options import TrainOptions
    from skippy.engine.training.run import run_training
    from skippy.engine.tune import TuneOptions, run_tune

__all__ = [
    "BUILTIN_MODEL",
    "BenchOptions",
    "CheckpointError",
    "ConfigError",
    "Device",
    "DraftCounts",
    "Dtype",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineInfo",
    "InvalidRequest",
    "PlanOptions",
    "Quantization",
    "Request",
    "SamplingParams",
    "SequenceOutput",
    "SkippyError",
    "StepOutput",
    "StepStats",
    "TokenLogprobs",
    "Tokenizer",
    "TrainOptions",
    "TuneOptions",
    "check_request",
    "read_prompts",
    "run_bench",
    "run_plan",
    "run_training",
    "run_tune",
]

_NEED_TORCH = {
    "Engine": "engine",
    "BenchOptions": "bench",
    "run_bench": "bench",
    "PlanOptions": "plan",
    "run_plan": "plan",
    "TrainOptions": "training.options",
    "run_training": "training.run",
    "TuneOptions": "tune",
    "run_tune": "tune",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"skippy.engine.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module 'skippy.engine' has no attribute {name!r}")
