"""What a training step takes beside what `skippy.engine.training.estimate` predicts.

    python tests/benchmarks/training_cost.py [--steps N] [--dtypes float32,bfloat16]

Models of 4 and 20 million random parameters are made on the spot and trained for some steps on
random text, with gradient checkpointing and without. The prediction takes what this processor
reaches: products and additions are timed in turn with the steps. Time is that of the process, not of the clock, so
that other processes count little; memory is what PyTorch's allocator gave out at its peak. JSON
on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from skippy.engine.adapter import S3DAdapter
from skippy.engine.model import CausalLM
from skippy.engine.shape import ModelConfig
from skippy.engine.training.data import Sample, temperature_of
from skippy.engine.training.estimate import BFLOAT16, FLOAT32, Estimate, Processor, estimate
from skippy.engine.training.here import Probe
from skippy.engine.training.options import TrainOptions
from skippy.engine.training.trainer import Trainer

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BASES = {
    "4M": ModelConfig(4096, 256, 704, 4, 4, 2, 64, 2048, 1e-5, tie_word_embeddings=True, rope_parameters=ROPE),
    "20M": ModelConfig(4096, 512, 1408, 6, 8, 4, 64, 2048, 1e-5, tie_word_embeddings=True, rope_parameters=ROPE),
}
OPTIONS = TrainOptions(sequences=64, length=192, batch_size=8, anchors=48)
PROBES = 10
"""Per step."""
PRECISIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16}


def make_trainer(base: ModelConfig, dtype: torch.dtype, options: TrainOptions) -> Trainer:
    """A trainer of a random model and adapter on random text."""
    torch.manual_seed(0)
    model = CausalLM(base, options.length)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(0, base.vocab_size, (options.sequences, options.length)).tolist()
    samples = [Sample(text, 1, temperature_of(place), 0) for place, text in enumerate(tokens)]
    return Trainer(model.to(dtype), S3DAdapter(options.adapter_config(base, 2 * parameters), base), samples, options)


def process_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_of_step(trainer: Trainer) -> int:
    """The most bytes that tensors hold during a step, the model and the adapter included."""
    tensors = [*trainer.model.parameters(), *trainer.state().values()]
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    held += sum(parameter.nbytes for parameter in trainer.adapter.parameters() if parameter.grad is not None)
    trainer.adapter.zero_grad()
    held -= sum(parameter.nbytes for parameter in trainer.adapter.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.run_step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return held + most


def measure(base: ModelConfig, dtype: str, checkpointing: bool, steps: int) -> tuple[float, int, Processor, Estimate]:
    """Seconds of a step, its peak of memory, what the processor reached meanwhile, and the prediction."""
    options = replace(OPTIONS, gradient_checkpointing=checkpointing)
    trainer = make_trainer(base, getattr(torch, dtype), options)
    rows = options.batch_size * options.length
    probe = Probe(base, rows, getattr(torch, dtype), torch.device("cpu"), clock=time.process_time)
    trainer.run_step()
    seconds = []
    for _ in range(steps):
        for _ in range(PROBES):
            probe.measure()
        seconds.append(process_seconds(trainer.run_step))
    predicted = estimate(base, trainer.adapter.config, options, PRECISIONS[dtype])
    return statistics.median(seconds), peak_of_step(trainer), probe.processor(), predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| base | dtype | checkpointing | GFLOP/s | GB/s | s per step | predicted | ratio | MB | predicted | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    lines = []
    for name, base in BASES.items():
        for dtype in options.dtypes.split(","):
            for checkpointing in (False, True):
                seconds, peak, processor, predicted = measure(base, dtype, checkpointing, options.steps)
                line = {
                    "base": name,
                    "dtype": dtype,
                    "checkpointing": checkpointing,
                    "gflops": processor.flops / 1e9,
                    "gbs": processor.bandwidth / 1e9,
                    "seconds": seconds,
                    "predicted_seconds": predicted.step_seconds(processor),
                    "bytes": peak,
                    "predicted_bytes": predicted.peak_bytes,
                }
                lines.append(line)
                print(
                    f"| {name} | {dtype} | {'yes' if checkpointing else 'no'} "
                    f"| {line['gflops']:.0f} | {line['gbs']:.1f} "
                    f"| {seconds:.3f} | {line['predicted_seconds']:.3f} | {seconds / line['predicted_seconds']:.2f} "
                    f"| {peak / 1e6:.1f} | {predicted.peak_bytes / 1e6:.1f} | {peak / predicted.peak_bytes:.2f} |",
                    flush=True,
                )
    print(
        json.dumps({"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability(), "steps": lines})
    )


if __name__ == "__main__":
    main()
