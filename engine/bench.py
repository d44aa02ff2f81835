"""Drafters side by side on the same prompts: the same tokens, in how much time and memory.

A plan is a drafter and how many tokens it drafts per step. Every (batch size, plan) pair is
run `repeat` times, in turn, after a warm-up of every plan; medians count for times, sums for
counts. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from skippy.engine.adapter_files import adapter_folder
from skippy.engine.config import EngineConfig
from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.drafters.ngram import NgramDrafter
from skippy.engine.drafters.none import NoDrafter
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.eagle import head_files, is_eagle
from skippy.engine.engine import Engine
from skippy.engine.errors import ConfigError
from skippy.engine.loading import weight_files
from skippy.engine.measure import (
    Run,
    cell,
    decode,
    describe_machine,
    encode_prompts,
    is_looping,
    sha256_of,
    tell,
)
from skippy.engine.prompts import read_prompts
from skippy.engine.types import SamplingParams

WARM_UP_TOKENS = 16
DEFAULT_DRAFTERS = (NoDrafter.name, NgramDrafter.name, S3DDrafter.name, HybridDrafter.name)
"""Of these, those that the engine has."""

Row = dict[str, Any]

COLUMNS: tuple[tuple[str, int, str, Callable[[Row], Any]], ...] = (
    # (title, width, format, value; None prints as a dash)
    ("batch", 5, "d", lambda row: row["batch_size"]),
    ("drafter", 8, "s", lambda row: row["plan"]),
    ("tokens/s", 8, ".1f", lambda row: row["tokens_per_second"]),
    ("ratio", 5, ".2f", lambda row: row["ratio"]),
    ("tok/step", 8, ".2f", lambda row: row["tokens_per_step"]),
    ("loop", 4, ".2f", lambda row: row["looping_share"]),
    ("looping", 7, ".2f", lambda row: row["tokens_per_step_looping"]),
    ("others", 6, ".2f", lambda row: row["tokens_per_step_not_looping"]),
    ("accepted", 8, ".2f", lambda row: row["acceptance"]),
    ("draft ms", 8, ".2f", lambda row: row["draft_ms"]),
    ("verify ms", 9, ".2f", lambda row: row["verify_ms"]),
    ("peak MiB", 8, ".0f", lambda row: row["peak_memory_bytes"] / 2**20),
    ("KV blocks", 9, "d", lambda row: row["kv_blocks_peak"]),
    ("accepted by depth", 0, "s", lambda row: " ".join(f"{p:.2f}" for p in row["acceptance_by_depth_where_drafted"])),
)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`prompts` is JSONL with a "prompt" string or a list "turns" per line; `limit` takes the first so many.

    Attributes:
        drafters: plans as `DraftPlan.parse` reads them; None takes every drafter of DEFAULT_DRAFTERS that there is.
        plot: a PNG file to draw the figures into.
    """

    prompts: str
    drafters: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    limit: int | None = None
    repeat: int = 3
    plot: str | None = None


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A drafter, and how many tokens it drafts per step; None leaves the number to the engine."""

    drafter: str
    num_speculative_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> DraftPlan:
        """DRAFTER or DRAFTER:G.

        Raises:
            ConfigError: it is neither, G is below 1, or the drafter drafts nothing and has one.
        """
        found = re.fullmatch(r"([^:]+)(?::([1-9][0-9]{0,5}))?", text)
        if found is None:
            raise ConfigError(f"--drafters: expected DRAFTER or DRAFTER:G with a G of at least 1, got {text!r}.")
        if found[1] == NoDrafter.name and found[2]:
            raise ConfigError(f"--drafters: {text!r} cannot be, {NoDrafter.name} drafts nothing.")
        return cls(found[1], int(found[2]) if found[2] else None)

    def __str__(self) -> str:
        return self.drafter + (f":{self.num_speculative_tokens}" if self.num_speculative_tokens else "")


# --- the command ------------------------------------------------------------------------------------------------


def run_bench(config: EngineConfig, options: BenchOptions) -> int:
    """Print a table and a JSON line; 1 if any plan's tokens differ from the first one's, else 0.

    Raises:
        ConfigError: the prompts cannot be read, a plan cannot be, or a plot cannot be drawn.
        CheckpointError: the model cannot be loaded.
    """
    plot = _plotter(options.plot)
    plans = [DraftPlan.parse(text) for text in options.drafters or ()]
    engine = Engine(
        replace(
            config,
            drafter="auto",  # what is set for serving does not say what is compared
            num_speculative_tokens=None,
            enable_prefix_caching=False,  # a cached prompt would make every run but the first look faster
            max_num_seqs=max(config.max_num_seqs, *options.batch_sizes),
        )
    )
    plans = plans or [DraftPlan(name) for name in DEFAULT_DRAFTERS if name in engine.drafting.drafters]
    _check_plans(plans, engine)
    options = replace(options, drafters=tuple(map(str, plans)))
    texts = read_prompts(options.prompts, options.limit)
    prompts = encode_prompts(engine, texts, options.max_tokens, options.prompts)
    hashes = _hashes(config, engine)
    _print_head(engine, len(prompts), options)
    rows: list[Row] = []
    for batch_size in options.batch_sizes:
        rows += _measure(engine, prompts, plans, batch_size, options)
    record = _record(engine, rows, hashes, options)
    _print_foot(record)
    tell(json.dumps(record))
    plot(record)
    return 1 if record["differing_outputs"] else 0


def _plotter(path: str | None) -> Callable[[Mapping[str, Any]], None]:
    """Draws a record into a file, or does nothing without one.

    Raises:
        ConfigError: matplotlib or the file's folder is missing.
    """
    if path is None:
        return lambda _: None
    try:
        from skippy.engine.plots import plot_bench
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'skippy-serve[plot]'.") from error
    if not path.endswith(".png") or not Path(path).parent.is_dir():
        raise ConfigError(f"--plot: expected a file FILE.png in a folder that exists, got {path!r}.")

    def plot(record: Mapping[str, Any]) -> None:
        try:
            plot_bench(record, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error

    return plot


def _check_plans(plans: SequenceOf[DraftPlan], engine: Engine) -> None:
    for plan in plans:
        if plan.drafter not in engine.drafting.drafters:
            known = ", ".join(engine.drafting.drafters)
            raise ConfigError(f"There is no drafter {plan.drafter!r}; there are: {known}.")
        if plans.count(plan) > 1:
            raise ConfigError(f"--drafters: {plan} is there twice.")
        most = engine.drafting.widest(plan.drafter)
        if (plan.num_speculative_tokens or 0) > most:
            raise ConfigError(f"--drafters: {plan} asks for more than the {most} tokens that can be drafted at once.")


# --- measuring --------------------------------------------------------------------------------------------------


def _measure(
    engine: Engine,
    prompts: SequenceOf[tuple[int, ...]],
    plans: SequenceOf[DraftPlan],
    batch_size: int,
    options: BenchOptions,
) -> list[Row]:
    """The rows of all plans at one batch size, printed."""
    runs = _runs(engine, prompts, plans, batch_size, options)
    base = runs[plans[0]]
    rows = [_row(plan, batch_size, runs[plan], base) for plan in plans]
    hold_against_ngram(rows)
    for row in rows:
        tell("  ".join(cell(value(row), width, form) for _, width, form, value in COLUMNS).rstrip())
    return rows


def _runs(
    engine: Engine,
    prompts: SequenceOf[tuple[int, ...]],
    plans: SequenceOf[DraftPlan],
    batch_size: int,
    options: BenchOptions,
) -> dict[DraftPlan, list[Run]]:
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        ignore_eos=True,
    )

    def run(plan: DraftPlan, prompts: SequenceOf[tuple[int, ...]], params: SamplingParams) -> Run:
        return decode(engine, prompts, plan.drafter, batch_size, params, plan.num_speculative_tokens)

    for plan in plans:
        run(plan, prompts[:batch_size], replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens)))
    runs: dict[DraftPlan, list[Run]] = {plan: [] for plan in plans}
    for _ in range(options.repeat):
        for plan in plans:
            runs[plan].append(run(plan, prompts, params))
    return runs


# --- figures ----------------------------------------------------------------------------------------------------


def _row(plan: DraftPlan, batch_size: int, runs: SequenceOf[Run], base: SequenceOf[Run]) -> Row:
    # Counts are sums over the turns: an engine that times its steps may draft differently in each.
    drafts = sum(r.drafts for r in runs)
    drafts_by_depth = _sums(r.drafts_by_depth for r in runs)
    accepted_by_depth = _sums(r.accepted_by_depth for r in runs)
    drafted = sum(drafts_by_depth)
    looping = [is_looping(output) for output in runs[0].outputs]
    return {
        "plan": str(plan),
        "drafter": plan.drafter,
        "num_speculative_tokens": plan.num_speculative_tokens,
        "batch_size": batch_size,
        "tokens_per_second": runs[0].tokens / statistics.median(r.seconds for r in runs),
        # Neighbours in time share the machine's moods, so the ratio is the median of pairs.
        "ratio": statistics.median(b.seconds / r.seconds for r, b in zip(runs, base, strict=True)),
        "tokens_per_step": sum(r.tokens for r in runs) / sum(r.steps for r in runs),
        "tokens_per_step_looping": _tokens_per_step(runs, looping=True),
        "tokens_per_step_not_looping": _tokens_per_step(runs, looping=False),
        "looping_share": sum(looping) / len(looping),
        "acceptance": sum(accepted_by_depth) / drafted if drafted else 0.0,
        "mean_draft_tokens": drafted / drafts if drafts else 0.0,
        # Drafts may differ in width: what is not drafted cannot be accepted, so a deep share of all of them is small
        # for either reason, and only the other one says how good a drafter is so deep.
        "acceptance_by_depth_of_all_drafts": [accepted / drafts for accepted in accepted_by_depth],
        "acceptance_by_depth_where_drafted": [a / d for a, d in zip(accepted_by_depth, drafts_by_depth, strict=True)],
        "draft_ms": _median_ms((r.draft_seconds, r.draft_passes) for r in runs),
        "verify_ms": _median_ms((r.verify_seconds, r.verify_passes) for r in runs),
        "peak_memory_bytes": max(r.peak_memory_bytes for r in runs),
        "kv_blocks_peak": max(r.kv_blocks_peak for r in runs),
        "differing_outputs": _differing(runs, base),
    }


def hold_against_ngram(rows: SequenceOf[Row]) -> None:
    """Add to rows of one batch size, for s3d and hybrid, their tokens per step to ngram's, of outputs that do not loop.

    Of several plans for ngram the best one counts. None for other drafters, and where there is nothing to compare.
    """
    name = "tokens_per_step_not_looping"
    best = max((row[name] or 0.0 for row in rows if row["drafter"] == NgramDrafter.name), default=0.0)
    for row in rows:
        comparable = row["drafter"] in (S3DDrafter.name, HybridDrafter.name) and row[name] and best
        row["not_looping_against_ngram"] = row[name] / best if comparable else None


def _median_ms(seconds_and_passes: Iterable[tuple[float, int]]) -> float:
    """Milliseconds per pass, 0 without any."""
    return 1e3 * statistics.median(seconds / max(1, passes) for seconds, passes in seconds_and_passes)


def _sums(lists: Iterable[list[int]]) -> list[int]:
    """Sums place by place; what a shorter list lacks is 0."""
    sums: list[int] = []
    for counts in lists:
        sums += [0] * (len(counts) - len(sums))
        for place, count in enumerate(counts):
            sums[place] += count
    return sums


def _differing(runs: SequenceOf[Run], base: SequenceOf[Run]) -> int:
    """How many prompts have, in any turn, another output than in the base's first."""
    turns = [zip(run.outputs, base[0].outputs, strict=True) for run in runs]
    return sum(any(pairs) for pairs in zip(*([a != b for a, b in turn] for turn in turns), strict=True))


def _tokens_per_step(runs: SequenceOf[Run], *, looping: bool) -> float | None:
    """Over the outputs that repeat themselves, or over the others; None if there are none."""
    chosen = [
        (len(output), counts.steps)
        for run in runs
        for output, counts in zip(run.outputs, run.counts, strict=True)
        if is_looping(output) == looping
    ]
    return sum(tokens for tokens, _ in chosen) / sum(steps for _, steps in chosen) if chosen else None


# --- what is measured, and on what ------------------------------------------------------------------------------


def _hashes(config: EngineConfig, engine: Engine) -> dict[str, str | None]:
    """SHA-256 of the weights of the model, and of its adapter or EAGLE-3 head if it has one."""
    folder = Path(engine.info.model_path)
    trained = adapter_folder(folder, config.adapter)
    files: list[Path] = []
    if trained is not None:
        files = head_files(trained) if is_eagle(trained) else [trained / "adapter.safetensors"]
    return {
        "model_sha256": sha256_of(weight_files(folder)),
        "adapter_sha256": sha256_of(files) if files else None,
    }


def _record(
    engine: Engine, rows: SequenceOf[Row], hashes: Mapping[str, str | None], options: BenchOptions
) -> dict[str, Any]:
    info = engine.info
    return {
        "bench": "drafters",
        "model": info.model,
        **hashes,
        "options": asdict(options),
        **describe_machine(engine),
        "kv_bytes": info.kv_bytes,
        "kv_blocks": info.num_blocks,
        "kv_block_size": info.block_size,
        "looping_share": rows[0]["looping_share"],
        "differing_outputs": sum(row["differing_outputs"] for row in rows),
        "rows": list(rows),
    }


def _print_head(engine: Engine, num_prompts: int, options: BenchOptions) -> None:
    info = engine.info
    tell(f"{num_prompts} prompts, {options.max_tokens} tokens each, temperature {options.temperature}")
    tell(f"KV cache of {info.kv_bytes / 2**20:.0f} MiB: {info.num_blocks} blocks of {info.block_size} tokens")
    tell("  ".join(title.rjust(width) for title, width, _, _ in COLUMNS))


def _print_foot(record: Mapping[str, Any]) -> None:
    for row in record["rows"]:
        against = row["not_looping_against_ngram"]
        if against is not None:
            tell(
                f"batch {row['batch_size']}: {row['plan']} makes {against:.2f} times the tokens per step of ngram on "
                "outputs that do not loop"
            )
    tell(f"{record['differing_outputs']} outputs differ from those of {record['rows'][0]['plan']}")
