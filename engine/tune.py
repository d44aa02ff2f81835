"""`skippy tune`: how long passes take on this machine, how deep drafts hold, and so how much to draft.

A sweep decodes some prompts while the width of the drafts changes every few steps: one decode
shows every width, at the same hour of the machine's day. From what it saw follows a forecast
for every width alone (see `forecast`), which is then held against a decode with that width,
as `bench` measures it, and against the closed form of `roofline`. What was seen is saved for
controllers to begin with.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skippy.engine.adapter import S3DAdapter
from skippy.engine.config import MAX_SPECULATIVE_TOKENS, EngineConfig, Quantization
from skippy.engine.controller import Controller, batch_class, widths_up_to
from skippy.engine.drafters.s3d import S3DDrafter, S3DFusedDrafter
from skippy.engine.engine import Engine
from skippy.engine.errors import ConfigError
from skippy.engine.forecast import Draft, Observations, predict
from skippy.engine.measure import Run, cell, decode, encode_prompts, tell
from skippy.engine.plan import model_sizes
from skippy.engine.prompts import read_prompts
from skippy.engine.roofline import beta_eff, closed_form, loaded_weights
from skippy.engine.tuned import FORMAT_VERSION, Measured, TunedPlan, check_writable, default_path, key_of, save_plan
from skippy.engine.types import SamplingParams, StepOutput
from skippy.engine.weights import Checkpoint, open_checkpoint
from skippy.engine.worker import leave_a_core

FUSED_HOLD = 3
"""Steps of a sweep with one width for a fused drafter, which at the first still drafts as widely as before."""
ENOUGH, MOST_SWEEPS = 64, 4
"""Steps of each batch size and width, but no more sweeps than that in a turn: the more, the fewer at a time."""
WARM_UP_TOKENS = 16
PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import json\n\n\ndef load_config(path):\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "def test_addition():\n    assert add(1, 2) == 3\n\n\ndef test_subtraction():\n",
    "for row in rows:\n    print(row)\nfor column in columns:\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def __repr__(self):\n",
    "Question: What is the capital of France?\nAnswer:",
    "The history of the steam engine begins",
    "Once upon a time there was a small dragon who",
    "Dear Sir or Madam,\n\nI am writing to",
    "To make a good cup of tea, first",
    "1. Open the box.\n2. Take out the parts.\n3.",
    "In this paper we show that",
    "Q: How many legs does a spider have?\nA: Eight.\nQ: How many legs does a bee have?\nA:",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
)

Row = dict[str, Any]

COLUMNS: tuple[tuple[str, int, str, Callable[[Row], Any]], ...] = (
    # (title, width, format, value; None prints as a dash)
    ("drafter", 7, "s", lambda row: row["drafter"]),
    ("batch", 5, "d", lambda row: row["batch_size"]),
    ("width", 5, "d", lambda row: row["width"]),
    ("rows", 4, ".1f", lambda row: row["rows"]),
    ("draft ms", 8, ".2f", lambda row: row["draft_ms"]),
    ("verify ms", 9, ".2f", lambda row: row["verify_ms"]),
    ("tok/step predicted", 18, ".2f", lambda row: row["predicted_tokens_per_step"]),
    ("measured", 8, ".2f", lambda row: row["tokens_per_step"]),
    ("tokens/s predicted", 18, ".1f", lambda row: row["predicted"]),
    ("measured", 8, ".1f", lambda row: row["measured"]),
    ("off by", 6, "+.0%", lambda row: row["predicted"] / row["measured"] - 1.0),
    ("closed form", 11, ".1f", lambda row: row["closed_form"]),
)


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What to decode for it.

    Attributes:
        output: file for the plan; None for the one that `serve` finds by itself.
        prompts: JSONL file, read with `read_prompts`; None takes PROMPTS.
        repeat: sweeps of each batch size, and measurements of each width.
    """

    output: str | None = None
    prompts: str | None = None
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    limit: int | None = None
    repeat: int = 2


class _Granted(NamedTuple):
    """What a sweep granted to a step, and whether the step counts."""

    batch: int
    width: int
    counts: bool


class Sweep(Controller):
    """Goes through some widths again and again, each time in another order.

    Args:
        hold: steps of one width in a row, of which the first does not count.

    Attributes:
        widths: those that it goes through.
    """

    def __init__(self, most: int, widths: Sequence[int], hold: int = 1, seed: int = 0) -> None:
        super().__init__(most)
        self.widths = tuple(widths)
        self._order, self._hold = list(widths), hold
        self._random = random.Random(seed)
        self._due: list[tuple[int, bool]] = []
        self._last: _Granted | None = None

    def width(self, batch: int) -> int:
        if not self._due:
            self._random.shuffle(self._order)
            self._due = [
                (width, place > 0 or self._hold == 1) for width in self._order for place in reversed(range(self._hold))
            ]
        width, counts = self._due.pop()
        self._last = _Granted(batch, width, counts)
        return width

    def best(self, batch: int, rides: bool = False) -> int:
        del rides
        return self.width(batch)

    def observe(self, batch: int, width: float, seconds: float, accepted: Sequence[int], others: int = 0) -> None:
        """Learns nothing: `_Watch` does."""

    def take_last(self) -> _Granted | None:
        """Of the last step; None if it only computed prompts."""
        last, self._last = self._last, None
        return last


class _Watch:
    """Writes down what a sweep's steps show."""

    def __init__(self, sweep: Sweep, seen: Observations, length: int) -> None:
        self._sweep, self._seen, self._length = sweep, seen, length
        self._places = [0] * seen.num_prompts
        self._accepted = [0] * seen.num_prompts

    def __call__(self, step: StepOutput) -> None:
        last, stats = self._sweep.take_last(), step.stats
        weights: list[float] = []
        for output in step.outputs:
            index = int(output.request_id)
            place, accepted = self._places[index], output.counts.accepted - self._accepted[index]
            self._places[index], self._accepted[index] = place + len(output.token_ids), output.counts.accepted
            if last is not None and last.counts and place:
                weights.append(self._seen.weight(index, place, last.width, self._sweep.widths))
                # The end of the text cuts drafts short.
                width = min(last.width, self._length - place - 1)
                self._seen.drafts[index][place].append(Draft(width, accepted))
        if last is None:
            self._seen.prompt_seconds += stats.prefill_seconds + stats.host_seconds
            self._seen.prompt_tokens += stats.prompt_tokens
        elif last.counts and not stats.prefill_seconds:
            times = self._seen.times[batch_class(last.batch), last.width]
            times.batch.append(last.batch)
            times.draft.append(stats.draft_seconds)
            times.verify.append(stats.verify_seconds)
            times.host.append(stats.host_seconds)
            times.rows.append(1.0 + stats.draft_tokens / last.batch)
            times.weight.append(statistics.fmean(weights))


def run_tune(config: EngineConfig, options: TuneOptions) -> int:
    """Measure, print a table, save the plan and return 0.

    Raises:
        ConfigError: the prompts cannot be read or are too few, the plan cannot be written, or there is no adapter.
        CheckpointError: the model cannot be loaded.
    """
    # As many threads as in serving; and a cached prompt would make every run but the first look faster.
    config = replace(
        leave_a_core(config),
        drafter="auto",
        enable_prefix_caching=False,
        num_speculative_tokens=None,
        tuned_plan=None,
        max_num_seqs=max(config.max_num_seqs, *options.batch_sizes),
        # No draft may be cut for want of rows: what is cut would count as refused.
        max_num_batched_tokens=max(
            config.max_num_batched_tokens, (MAX_SPECULATIVE_TOKENS + 1) * max(options.batch_sizes)
        ),
    )
    engine = Engine(config)
    drafter = S3DDrafter.name
    if drafter not in engine.drafting.drafters:
        raise ConfigError(
            f"there is nothing to tune: {config.model} has no adapter for {drafter}. `skippy train` makes one; "
            "--adapter names one that is not beside the model."
        )
    checkpoint = open_checkpoint(config.model, config.revision)
    path = default_path(checkpoint) if options.output is None else Path(options.output).expanduser()
    check_writable(path)
    texts = PROMPTS[: options.limit] if options.prompts is None else read_prompts(options.prompts, options.limit)
    prompts = encode_prompts(engine, texts, options.max_tokens, options.prompts or "the built-in list")
    shape = _adapter(engine).config
    # Another band is another training.
    layers = checkpoint.config.num_hidden_layers
    tell(f"{drafter}: the adapter's band of skipped layers is [{shape.skip_start}, {shape.skip_end}) of {layers}")
    tell(f"{len(prompts)} prompts, {options.max_tokens} tokens each, temperature {options.temperature}")
    tell("  ".join(title.rjust(width) for title, width, _, _ in COLUMNS))
    seen, measured = _measure(engine, prompts, drafter, options)
    rows = _rows(drafter, seen, measured, prompts, options, _beta_eff(engine, checkpoint, config.quantization))
    for row in rows:
        tell("  ".join(cell(value(row), width, form) for _, width, form, value in COLUMNS))
    found = Measured(**seen.prior(engine.drafting.widest(drafter)))  # type: ignore[arg-type]
    tell(f"{drafter}: accepted by depth {' '.join(f'{share:.2f}' for share in found.acceptance)}")
    key = key_of(config, checkpoint, engine.info.device, engine.info.dtype)
    save_plan(path, TunedPlan(FORMAT_VERSION, key, {drafter: found}, rows))
    tell(f"saved {path}")
    return 0


class _Measured(NamedTuple):
    """Of decodes with one batch size and width."""

    tokens_per_second: float
    tokens_per_step: float


def _measure(
    engine: Engine, prompts: Sequence[tuple[int, ...]], drafter: str, options: TuneOptions
) -> tuple[Observations, dict[tuple[int, int], _Measured]]:
    """What sweeps showed, and by batch size and width how decodes with that width alone went."""
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed, ignore_eos=True
    )
    most = engine.drafting.widest(drafter)
    widths = widths_up_to(most)
    hold = FUSED_HOLD if _adapter(engine).config.fused else 1
    seen = Observations(len(prompts))

    def sweep(batch_size: int, steps: Sweep) -> None:
        engine.drafting.control(drafter, steps)
        decode(engine, prompts, drafter, batch_size, params, None, _Watch(steps, seen, params.max_tokens))

    # The widest drafts tell most of how deep drafts hold; passes are still warming up.
    sweep(max(options.batch_sizes), Sweep(most, [most]))
    seen.forget_times()
    runs: dict[tuple[int, int], list[Run]] = {}
    for batch_size in options.batch_sizes:
        warm_up = replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens))
        decode(engine, prompts[:batch_size], drafter, batch_size, warm_up, most)
        for turn in range(options.repeat):
            # In turn with the decodes that its forecasts are held against: machines have moods.
            for number in range(MOST_SWEEPS):
                sweep(batch_size, Sweep(most, widths, hold, seed=turn * MOST_SWEEPS + number))
                if seen.count(min(batch_size, len(prompts)), widths) >= ENOUGH * (turn + 1):
                    break
            if not seen.covers(widths):
                raise ConfigError("too little text to measure every width with: more prompts or a larger max_tokens.")
            for width in widths:
                run = decode(engine, prompts, drafter, batch_size, params, width)
                runs.setdefault((batch_size, width), []).append(run)
    return seen, {
        at: _Measured(found[0].tokens / statistics.median(r.seconds for r in found), found[0].tokens / found[0].steps)
        for at, found in runs.items()
    }


def _rows(
    drafter: str,
    seen: Observations,
    measured: dict[tuple[int, int], _Measured],
    prompts: Sequence[tuple[int, ...]],
    options: TuneOptions,
    beta: float,
) -> list[Row]:
    lengths = [len(prompt) for prompt in prompts]
    acceptance = seen.constant_acceptance()
    rows = []
    for (batch_size, width), measurement in measured.items():
        forecast = predict(seen, lengths, width, batch_size, options.max_tokens)
        times = seen.times[batch_class(min(batch_size, len(prompts))), width]
        rows.append(
            {
                "drafter": drafter,
                "batch_size": batch_size,
                "width": width,
                "rows": _mean(times.rows),
                "draft_ms": _mean(times.draft, 1e3),
                "verify_ms": _mean(times.verify, 1e3),
                "predicted_tokens_per_step": forecast.tokens_per_step,
                "predicted": forecast.tokens_per_second,
                "tokens_per_step": measurement.tokens_per_step,
                "measured": measurement.tokens_per_second,
                "closed_form": measured[batch_size, 0].tokens_per_second * closed_form(acceptance, width, beta),
            }
        )
    return rows


def _mean(values: Sequence[float], scale: float = 1.0) -> float | None:
    return scale * statistics.fmean(values) if values else None


def _adapter(engine: Engine) -> S3DAdapter:
    drafter = engine.drafting.drafters[S3DDrafter.name]
    assert isinstance(drafter, S3DDrafter | S3DFusedDrafter)
    return drafter.adapter


def _beta_eff(engine: Engine, checkpoint: Checkpoint, quantization: Quantization) -> float:
    """Of the adapter's draft pass; a fused one has none."""
    adapter = _adapter(engine)
    if adapter.config.fused:
        return 0.0
    sizes = model_sizes(checkpoint.config)
    itemsize, longest = getattr(torch, engine.info.dtype).itemsize, engine.info.max_model_len
    on_cpu, stored = engine.info.device == "cpu", checkpoint.dtype.itemsize
    weights = loaded_weights(sizes, itemsize, stored, quantization, longest, on_cpu=on_cpu)
    draftable = len(adapter.draft_ids) if adapter.draft_ids is not None else sizes.vocab_size
    return beta_eff(weights, len(adapter.kept) / sizes.layers, draftable / sizes.vocab_size)
