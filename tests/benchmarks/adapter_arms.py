"""Which parts of an adapter pay: named arms, several seeds, the same number of steps for each.

    python tests/benchmarks/adapter_arms.py MODEL DATA --out FILE.jsonl [--steps N] [--seeds N] [--plot FILE.png]
    python tests/benchmarks/adapter_arms.py MODEL DATA --times

DATA is the data.safetensors that `skippy train` left for this model. Every arm is trained
from scratch on it and walked along its held-out texts; then the engine drafts with it, to
time the draft pass (batch 1). Finished arms are read back from FILE.jsonl, so that a
run can be interrupted. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skippy.engine import Engine, EngineConfig, SamplingParams
from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.loading import weight_files
from skippy.engine.measure import decode, describe_machine
from skippy.engine.training.data import Sample
from skippy.engine.training.files import load_samples
from skippy.engine.training.options import TrainOptions
from skippy.engine.training.run import load_base
from skippy.engine.training.trainer import Trainer
from skippy.engine.weights import open_checkpoint

TIMED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm changes of the adapter that `skippy train` makes by default."""

    name: str
    head: bool = True
    bridge: bool = True
    recurrent: bool = True
    total_variation: bool = True
    shift: int = 0
    """By how many layers the skip band is moved."""


ARMS = (
    Arm("LoRA only", head=False, bridge=False, recurrent=False, total_variation=False),
    Arm("+ head", bridge=False, recurrent=False, total_variation=False),
    Arm("+ bridge", recurrent=False, total_variation=False),
    Arm("+ total variation", recurrent=False),
    Arm("+ recurrent state"),
    Arm("band one layer earlier", shift=-1),
    Arm("band one layer later", shift=1),
)


def main() -> int:
    options = _parse()
    engine = Engine(EngineConfig(model=options.model, device="cpu", drafter="none", num_threads=options.threads))
    samples, _ = load_samples(Path(options.data))
    if options.times:
        return print_times(engine, samples, options)
    out = Path(options.out)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(record["arm"], record["seed"]) for record in records}
    for seed in range(options.seeds):
        for arm in ARMS:
            if (arm.name, seed) in done:
                continue
            record = run_arm(engine, arm, seed, samples, options)
            records.append(record)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{arm.name}, seed {seed}: {record['greedy']:.2f} {record['sampled']:.2f}", file=sys.stderr)
    table = summarise(records)
    print(f"{'arm':>22} {'greedy':>12} {'T 0.8':>12} {'draft ms':>8} {'numbers':>8}")
    for row in table:
        print(
            f"{row['arm']:>22} {row['greedy']:>5.2f} ± {row['greedy_spread']:.2f} {row['sampled']:>6.2f} ± "
            f"{row['sampled_spread']:.2f} {row['draft_ms']:>8.2f} {row['numbers']:>8}"
        )
    if options.plot:
        plot(records, table, options.plot)
    print(json.dumps({"bench": "adapter_arms", **vars(options), **describe_machine(engine), "rows": table}))
    return 0


def run_arm(engine: Engine, arm: Arm, seed: int, samples: list[Sample], options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed, walk it, and time its drafts."""
    torch.manual_seed(seed)
    config = EngineConfig(model=options.model, device="cpu")
    checkpoint = open_checkpoint(config.model)
    training = TrainOptions(
        steps=options.steps,
        seed=seed,
        batch_size=options.batch_size,
        length=len(samples[0].tokens),
    )
    if not arm.total_variation:
        training = replace(training, tv_share=0.0)
    shape = arm_shape(arm, training.adapter_config(checkpoint.config, _bytes(weight_files(checkpoint.path))))
    adapter = S3DAdapter(shape, checkpoint.config)
    trainer = Trainer(load_base(checkpoint, config, training.length), adapter, samples, training)
    started = time.perf_counter()
    for _ in range(options.steps):
        trainer.run_step()
    seconds = time.perf_counter() - started
    walks = trainer.walk()
    return {
        "arm": arm.name,
        "seed": seed,
        "greedy": walks.greedy.tokens_per_step,
        "sampled": walks.sampled.tokens_per_step,
        "greedy_by_depth": walks.greedy.by_depth,
        "sampled_by_depth": walks.sampled.by_depth,
        "draft_ms": draft_ms(engine, adapter, trainer.held_out.greedy),
        "numbers": sum(p.numel() for p in adapter.parameters()),
        "training_seconds": seconds,
        "shape": asdict(shape),
    }


def print_times(engine: Engine, samples: list[Sample], options: argparse.Namespace) -> int:
    """The draft pass of every arm, not trained, as training makes it no faster; the median of three turns."""
    checkpoint = open_checkpoint(options.model)
    full = TrainOptions().adapter_config(checkpoint.config, _bytes(weight_files(checkpoint.path)))
    times: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for _ in range(3):
        for arm in ARMS:
            times[arm.name].append(draft_ms(engine, S3DAdapter(arm_shape(arm, full), checkpoint.config), samples))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, milliseconds in medians.items():
        print(f"{name:>22} {milliseconds:.2f} ms")
    print(json.dumps({"bench": "adapter_arms times", **vars(options), **describe_machine(engine), "draft_ms": medians}))
    return 0


def arm_shape(arm: Arm, full: AdapterConfig) -> AdapterConfig:
    """The adapter of an arm; what an arm leaves out is not made up for elsewhere."""
    values = asdict(full)
    values["skip_start"] += arm.shift
    values["skip_end"] += arm.shift
    if not arm.head:
        values["head_size"] = 0
    if not arm.bridge:
        values["bridge_rank"] = 0
    values["recurrent"] = arm.recurrent
    return AdapterConfig(**values)


def draft_ms(engine: Engine, adapter: S3DAdapter, samples: list[Sample]) -> float:
    """The time of a draft in the engine at batch 1, its widest."""
    adapter = adapter.float().requires_grad_(False)
    engine.add_drafter(S3DDrafter(engine.runner, adapter, engine.states))
    params = SamplingParams(max_tokens=TIMED_TOKENS, temperature=0.0, ignore_eos=True)
    prompts = [tuple(sample.tokens[: sample.start]) for sample in samples[:4]]
    width = adapter.config.num_speculative_tokens
    run = decode(engine, prompts, "s3d", 1, params, width)
    return 1e3 * run.draft_seconds / run.drafts


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm: means over the seeds, and half the distance between the best and the worst."""
    rows = []
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)
    for arm, runs in by_arm.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(runs), "numbers": runs[0]["numbers"]}
        for name in ("greedy", "sampled"):
            values = [run[name] for run in runs]
            row[name] = statistics.mean(values)
            row[f"{name}_spread"] = (max(values) - min(values)) / 2
        row["draft_ms"] = statistics.median(run["draft_ms"] for run in runs)
        rows.append(row)
    return rows


def plot(records: list[dict[str, Any]], table: list[dict[str, Any]], path: str) -> None:
    """A bar per arm with a dot per seed, greedy and sampled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an optional extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True), ("greedy", "sampled"), ("greedy", "temperature 0.8"), strict=True
    ):
        arms = [row["arm"] for row in table]
        axes.barh(arms, [row[name] for row in table], color="lightsteelblue")
        for record in records:
            axes.plot(record[name], arms.index(record["arm"]), "k.", markersize=4)
        axes.set_xlim(left=1.0)
        axes.set_xlabel("walked tokens per step")
        axes.set_title(title)
    axes.invert_yaxis()  # of both: they share it
    figure.savefig(path, dpi=150)


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", default="arms.jsonl")
    parser.add_argument("--times", action="store_true", help="train nothing, time the draft passes")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
