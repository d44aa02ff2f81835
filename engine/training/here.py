"""What a training would take on this machine: `estimate` with what its processor reaches and its memory holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from skippy.engine.adapter import AdapterConfig
from skippy.engine.config import Quantization
from skippy.engine.memory import total_bytes
from skippy.engine.shape import ModelConfig
from skippy.engine.training.estimate import BYTES_PER_WEIGHT, Estimate, Precision, Processor, estimate
from skippy.engine.training.options import TrainOptions, num_parameters

SHARE_OF_MEMORY = 0.85
"""That a training may fill without gradient checkpointing."""
CPU_PROBE_FLOPS = 2**31
"""Of a product that is timed on a CPU; about 20 ms of one core."""
CPU_PROBE_ROWS = 256
"""Fewer, and reading the matrix would be timed."""
PROBES = 3


def cost_here(
    base: ModelConfig,
    adapter: AdapterConfig,
    options: TrainOptions,
    dtype: torch.dtype,
    quantization: Quantization,
    memory: int,
) -> Estimate:
    """The cost of a training; where `options` leave it open, with gradient checkpointing if it does not fit else.

    Args:
        memory: bytes that the device has, in use or not.
    """
    precision = Precision(dtype.itemsize, BYTES_PER_WEIGHT.get(quantization, dtype.itemsize))
    if options.gradient_checkpointing is None:
        plain = estimate(base, adapter, replace(options, gradient_checkpointing=False), precision)
        too_large = plain.peak_bytes > SHARE_OF_MEMORY * memory
        options = replace(options, gradient_checkpointing=too_large)
    return estimate(base, adapter, options, precision)


def describe_training(base: ModelConfig, stored: torch.dtype, quantization: Quantization, device: torch.device) -> str:
    """How long `skippy train` would take here with its defaults, and how much memory; both are predictions.

    Takes a fraction of a second.

    Args:
        stored: the type of the model's weight files.
    """
    options, dtype = TrainOptions(), torch.bfloat16
    adapter = options.adapter_config(base, num_parameters(base) * stored.itemsize)
    cost = cost_here(base, adapter, options, dtype, quantization, memory_of(device))
    probe = Probe(base, options.batch_size * options.length, dtype, device)
    for _ in range(PROBES):
        probe.measure()
    processor = probe.processor()
    hours = (options.steps * cost.step_seconds(processor) + cost.text.seconds(processor)) / 3600
    return f"about {hours:.1f} hours and {cost.peak_bytes / 1e9:.1f} GB here"


class Probe:
    """What a processor reaches on a model's products, and on what lies between: a sum, a softmax, a copy.

    Args:
        clock: seconds; where a device works by itself, it is waited for.
    """

    def __init__(
        self,
        base: ModelConfig,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        inner = 2 * base.intermediate_size
        if device.type == "cpu":
            rows = min(rows, CPU_PROBE_ROWS)
            inner = max(1, min(inner, CPU_PROBE_FLOPS // (2 * rows * base.hidden_size)))
        self._x = torch.randn(rows, base.hidden_size, device=device).to(dtype)
        self._weight = torch.randn(inner, base.hidden_size, device=device).to(dtype)
        self._y, self._z = (torch.randn(rows, inner, device=device).to(dtype) for _ in range(2))
        self._wait: Callable[[], None] | None = torch.cuda.synchronize if device.type == "cuda" else None
        self._clock = clock
        self._flops: list[float] = []
        self._bandwidth: list[float] = []

    def measure(self) -> None:
        """Time each once."""
        seconds = self._seconds(lambda: F.linear(self._x, self._weight))
        self._flops.append(2 * self._weight.numel() * len(self._x) / seconds)
        seconds = self._seconds(lambda: (self._y + self._z, self._y.softmax(-1), self._z.clone()))
        self._bandwidth.append((3 + 2 + 2) * self._y.nbytes / seconds)

    def processor(self) -> Processor:
        """The medians."""
        return Processor(statistics.median(self._flops), statistics.median(self._bandwidth))

    def _seconds(self, work: Callable[[], object]) -> float:
        began = self._now()
        work()
        return max(self._now() - began, 1e-9)

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return self._clock()


def memory_of(device: torch.device) -> int:
    """Bytes that a device has, in use or not."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    return total_bytes()
