"""Drafters side by side on the same prompts: the same tokens, in how much time.

Every (batch size, drafter) pair is run `repeat` times, in turn, after a warm-up, and the
median counts. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from skippy.engine.config import EngineConfig
from skippy.engine.engine import Engine
from skippy.engine.errors import ConfigError
from skippy.engine.prompts import read_prompts
from skippy.engine.tokenizer import Tokenizer
from skippy.engine.types import Request, SamplingParams, StepStats

LOOPING_BELOW = 0.8
"""An output whose share of distinct 4-grams is below this one repeats itself."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`prompts` is JSONL with a "prompt" string or a list "turns" per line; `limit` takes the first so many."""

    prompts: str
    drafters: tuple[str, ...] = ("none", "ngram")
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    limit: int | None = None
    repeat: int = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over all prompts. Tokens per step are counted along the decode."""

    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int
    accepted_per_pos: list[int]
    drafts: int
    draft_seconds: float
    verify_seconds: float
    passes: int
    outputs: list[list[int]]
    steps_of: list[int]
    """Verify steps of each output."""


def run_bench(config: EngineConfig, options: BenchOptions) -> int:
    """Print a table and a JSON line; 1 if any drafter's tokens differ from the first one's, else 0.

    Raises:
        ConfigError: the prompts cannot be read, or a drafter is unknown.
        CheckpointError: the model cannot be loaded.
    """
    # A cached prompt would make every run but the first look faster.
    engine = Engine(
        replace(config, enable_prefix_caching=False, max_num_seqs=max(config.max_num_seqs, *options.batch_sizes))
    )
    unknown = sorted(set(options.drafters) - set(engine.info.drafters))
    if unknown:
        raise ConfigError(f"There is no drafter {unknown[0]!r}; there are: {', '.join(engine.info.drafters)}.")
    prompts = _read_prompts(engine, options)
    _print(f"{len(prompts)} prompts, {options.max_tokens} tokens each, temperature {options.temperature}")
    _print(f"{'batch':>5} {'drafter':>8} {'tokens/s':>9} {'ratio':>6} {'tok/step':>8} {'accepted':>8} {'pass ms':>8}")
    rows: list[dict[str, Any]] = []
    differing = 0
    for batch_size in options.batch_sizes:
        runs = _runs(engine, prompts, batch_size, options)
        base = runs[options.drafters[0]]
        for drafter in options.drafters:
            row = _row(drafter, batch_size, runs[drafter], base)
            wrong = sum(a != b for a, b in zip(runs[drafter][0].outputs, base[0].outputs, strict=True))
            differing += wrong
            rows.append({**row, "differing_outputs": wrong})
            _print(
                f"{batch_size:>5} {drafter:>8} {row['tokens_per_second']:>9.1f} {row['ratio']:>6.2f} "
                f"{row['tokens_per_step']:>8.2f} {row['acceptance']:>8.2f} {row['pass_ms']:>8.2f}"
            )
    looping = [is_looping(output) for output in base[0].outputs]
    _print(f"{differing} outputs differ from those of {options.drafters[0]}")
    record = {
        "bench": "drafters",
        "options": asdict(options),
        **describe_machine(engine),
        "looping_share": sum(looping) / len(looping),
        "differing_outputs": differing,
        "rows": rows,
    }
    _print(json.dumps(record))
    return 1 if differing else 0


def decode(
    engine: Engine, prompts: list[tuple[int, ...]], drafter: str, batch_size: int, params: SamplingParams
) -> Run:
    """All prompts through the engine, `batch_size` at a time."""
    stats: list[StepStats] = []
    outputs: list[list[int]] = [[] for _ in prompts]
    steps_of = [0] * len(prompts)
    waiting = list(range(len(prompts)))[::-1]
    live = 0
    start = time.perf_counter()
    while waiting or live:
        while waiting and live < batch_size:
            index = waiting.pop()
            engine.add(Request(str(index), prompts[index], params, drafter=drafter))
            live += 1
        step = engine.step()
        stats.append(step.stats)
        for output in step.outputs:
            outputs[int(output.request_id)] += output.token_ids
            steps_of[int(output.request_id)] = output.counts.steps
            if output.finish_reason is not None:
                if output.error is not None:
                    raise RuntimeError(output.error)
                live -= 1
    seconds = time.perf_counter() - start
    per_position = [0] * max(len(s.accepted_per_pos) for s in stats)
    for s in stats:
        for place, count in enumerate(s.accepted_per_pos):
            per_position[place] += count
    return Run(
        seconds=seconds,
        tokens=sum(s.generation_tokens for s in stats),
        steps=sum(s.decode_sequences for s in stats),
        drafted=sum(s.draft_tokens for s in stats),
        accepted=sum(s.accepted_tokens for s in stats),
        accepted_per_pos=per_position,
        drafts=sum(s.drafts for s in stats),
        draft_seconds=sum(s.draft_seconds for s in stats),
        verify_seconds=sum(s.verify_seconds for s in stats),
        passes=sum(s.verify_seconds > 0 for s in stats),
        outputs=outputs,
        steps_of=steps_of,
    )


def _runs(
    engine: Engine, prompts: list[tuple[int, ...]], batch_size: int, options: BenchOptions
) -> dict[str, list[Run]]:
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        ignore_eos=True,
    )
    decode(engine, prompts[:batch_size], options.drafters[0], batch_size, replace(params, max_tokens=16))
    runs: dict[str, list[Run]] = {drafter: [] for drafter in options.drafters}
    for _ in range(options.repeat):
        for drafter in options.drafters:
            runs[drafter].append(decode(engine, prompts, drafter, batch_size, params))
    return runs


def _row(drafter: str, batch_size: int, runs: list[Run], base: list[Run]) -> dict[str, Any]:
    run = runs[0]  # counts are the same in every run
    seconds = statistics.median(r.seconds for r in runs)
    return {
        "drafter": drafter,
        "batch_size": batch_size,
        "tokens_per_second": run.tokens / seconds,
        # Neighbours in time share the machine's moods, so the ratio is the median of pairs.
        "ratio": statistics.median(b.seconds / r.seconds for r, b in zip(runs, base, strict=True)),
        "tokens_per_step": run.tokens / run.steps,
        "acceptance": run.accepted / run.drafted if run.drafted else 0.0,
        "acceptance_by_depth": [count / run.drafts for count in run.accepted_per_pos],
        "draft_ms": 1e3 * statistics.median(r.draft_seconds for r in runs) / max(1, run.passes),
        "pass_ms": 1e3 * statistics.median(r.verify_seconds for r in runs) / max(1, run.passes),
        "tokens_per_step_looping": _tokens_per_step(run, looping=True),
        "tokens_per_step_not_looping": _tokens_per_step(run, looping=False),
    }


def _tokens_per_step(run: Run, *, looping: bool) -> float | None:
    """Over the outputs that repeat themselves, or over the others; None if there are none."""
    chosen = [i for i, output in enumerate(run.outputs) if is_looping(output) == looping]
    return sum(len(run.outputs[i]) for i in chosen) / sum(run.steps_of[i] for i in chosen) if chosen else None


def is_looping(tokens: list[int]) -> bool:
    """Whether an output repeats itself, judged by its distinct 4-grams."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return bool(grams) and len(set(grams)) / len(grams) < LOOPING_BELOW


def _read_prompts(engine: Engine, options: BenchOptions) -> list[tuple[int, ...]]:
    texts = read_prompts(options.prompts, options.limit)
    tokenizer = Tokenizer.load(engine.info.model_path)
    room = engine.info.max_model_len - options.max_tokens
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    fitting = [prompt for prompt in prompts if 0 < len(prompt) <= room]
    if not fitting:
        raise ConfigError(f"{options.prompts} holds no prompt that fits {room} tokens.")
    if len(fitting) < len(prompts):
        _print(f"{len(prompts) - len(fitting)} prompts are longer than {room} tokens and left out")
    return fitting


def describe_machine(engine: Engine) -> dict[str, Any]:
    """What a figure was measured on, for its record."""
    on_gpu = engine.info.device.startswith("cuda")
    cpu = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "dtype": engine.info.dtype,
        "num_speculative_tokens": engine.info.num_speculative_tokens,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "skippy": version("skippy-serve"),
    }


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
