"""Decoding that is measured: what a run over some prompts came to, of which model and machine, and how it is told."""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from skippy.engine.engine import Engine
from skippy.engine.errors import ConfigError
from skippy.engine.memory import peak_bytes, reset_peak
from skippy.engine.tokenizer import Tokenizer
from skippy.engine.types import DraftCounts, Request, SamplingParams, StepOutput

LOOPING_BELOW = 0.8
"""An output whose share of distinct 4-grams is below this one repeats itself."""


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over all prompts. Tokens per step are counted along the decode.

    Attributes:
        seconds: wall-clock, prompts included.
        steps: rows that chose a token.
        drafts: drafts that were verified; drafts_by_depth counts those of more than j tokens,
            accepted_by_depth those whose token j was accepted.
        draft_passes, verify_passes: steps that drafted, and those that carried no prompt.
        counts: of each output.
        peak_memory_bytes: see `peak_bytes`.
        kv_blocks_peak: the most blocks held at the end of a step.
    """

    seconds: float
    tokens: int
    steps: int
    drafts: int
    drafts_by_depth: list[int]
    accepted_by_depth: list[int]
    draft_seconds: float
    draft_passes: int
    verify_seconds: float
    verify_passes: int
    outputs: list[list[int]]
    counts: list[DraftCounts]
    peak_memory_bytes: int
    kv_blocks_peak: int


def decode(
    engine: Engine,
    prompts: SequenceOf[tuple[int, ...]],
    drafter: str,
    batch_size: int,
    params: SamplingParams,
    num_speculative_tokens: int | None = None,
    on_step: Callable[[StepOutput], None] = lambda _: None,
) -> Run:
    """All prompts through the engine, `batch_size` at a time; nothing is drafted from outputs of before."""
    engine.drafting.forget()
    requests = [
        Request(str(index), prompt, params, 1, drafter, num_speculative_tokens) for index, prompt in enumerate(prompts)
    ]
    steps: list[StepOutput] = []
    reset_peak(engine.info.device)
    start = time.perf_counter()
    for step in engine.run(requests, batch_size):
        steps.append(step)
        on_step(step)
    seconds = time.perf_counter() - start
    return _tally(steps, len(prompts), seconds, peak_bytes(engine.info.device))


def _tally(steps: SequenceOf[StepOutput], num_prompts: int, seconds: float, peak_memory_bytes: int) -> Run:
    outputs: list[list[int]] = [[] for _ in range(num_prompts)]
    counts = [DraftCounts() for _ in range(num_prompts)]
    drafts: list[tuple[int, int]] = []  # (drafted, accepted) of each
    for output in (output for step in steps for output in step.outputs):
        index = int(output.request_id)
        outputs[index] += output.token_ids
        before, counts[index] = counts[index], output.counts
        if output.counts.drafted > before.drafted:
            drafts.append((output.counts.drafted - before.drafted, output.counts.accepted - before.accepted))
    depths = range(max((drafted for drafted, _ in drafts), default=0))
    stats = [step.stats for step in steps]
    return Run(
        seconds=seconds,
        tokens=sum(map(len, outputs)),
        steps=sum(c.steps for c in counts),
        drafts=len(drafts),
        drafts_by_depth=[sum(drafted > depth for drafted, _ in drafts) for depth in depths],
        accepted_by_depth=[sum(accepted > depth for _, accepted in drafts) for depth in depths],
        draft_seconds=sum(s.draft_seconds for s in stats),
        draft_passes=sum(s.draft_seconds > 0 for s in stats),
        verify_seconds=sum(s.verify_seconds for s in stats),
        verify_passes=sum(s.verify_seconds > 0 for s in stats),
        outputs=outputs,
        counts=counts,
        peak_memory_bytes=peak_memory_bytes,
        kv_blocks_peak=max(s.kv_blocks_used for s in stats),
    )


def is_looping(tokens: SequenceOf[int]) -> bool:
    """Whether an output repeats itself, judged by its distinct 4-grams."""
    return distinct_grams(tokens) < LOOPING_BELOW


def distinct_grams(tokens: SequenceOf[int]) -> float:
    """The share of distinct 4-grams among all of an output; 1 if it is shorter than that."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def encode_prompts(engine: Engine, texts: Iterable[str], max_tokens: int, source: str) -> list[tuple[int, ...]]:
    """The prompts that leave room for `max_tokens`.

    Raises:
        ConfigError: none does.
    """
    tokenizer = Tokenizer.load(engine.info.model_path)
    room = engine.info.max_model_len - max_tokens
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    fitting = [prompt for prompt in prompts if 0 < len(prompt) <= room]
    if not fitting:
        raise ConfigError(f"{source} holds no prompt that fits {room} tokens.")
    if len(fitting) < len(prompts):
        tell(f"{len(prompts) - len(fitting)} prompts are longer than {room} tokens and left out")
    return fitting


def sha256_of(files: Iterable[Path]) -> str:
    """Of the files one behind the other, so that one file's is what sha256sum says of it."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def describe_machine(engine: Engine) -> dict[str, Any]:
    """What a figure was measured on, for its record."""
    on_gpu = engine.info.device.startswith("cuda")
    cpu = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "dtype": engine.info.dtype,
        "quantization": engine.info.quantization,
        "num_speculative_tokens": engine.info.num_speculative_tokens,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "skippy": version("skippy-serve"),
    }


def cell(value: Any, width: int, form: str) -> str:
    """A value of a table, or a dash for None."""
    return ("-" if value is None else format(value, form)).rjust(width)


def tell(line: str) -> None:
    """Print a line now, whoever reads."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
