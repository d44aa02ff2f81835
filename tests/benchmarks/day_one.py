"""What drafting brings on the first day, before anybody trained an adapter.

    python tests/benchmarks/day_one.py DATA [--model M] [--batch-size N] [--max-tokens N] [--repeat N] [--limit N]

DATA is a folder with HumanEval.jsonl and spec_bench_question.jsonl. The prompts are those
named in tests/data/day_one.json: functions of HumanEval to be written again under another
name, and Spec-Bench's texts to be summarised, questions, and questions with a text. Prompts
longer than the model's context lose their beginning. `none` and the drafter that `auto` takes
where there is no adapter (one beside the model is left out) run in turn on the same prompts,
greedy and at temperature 0.8. A new engine is made for every turn, because an engine that has
seen a prompt's output drafts from it.

A group of prompts repeats if at least half of its outputs' 4-grams occurred before, in the
prompt or in the output. Times are medians of the turns. JSON on the last line; exit code 1 if
any output differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.adapter_files import BESIDE_MODEL
from skippy.engine.hub import find_model
from skippy.engine.measure import Run, decode, describe_machine

IDS = Path(__file__).parents[1] / "data" / "day_one.json"
MODES = {"greedy": 0.0, "temperature 0.8": 0.8}
PLAIN = "none"
REPEATS_FROM = 0.5


@dataclass
class Group:
    """Prompts that run at the same time, and what became of them in every turn, by mode and drafter."""

    kind: str
    prompts: list[tuple[int, ...]]
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)

    def repeats(self, mode: str) -> bool:
        outputs = self.runs[mode, PLAIN][0].outputs
        shares = [repeated_share(p, output) for p, output in zip(self.prompts, outputs, strict=True)]
        return statistics.mean(shares) >= REPEATS_FROM


def texts(folder: Path) -> dict[str, list[str]]:
    """The prompts by kind."""
    functions = _by_id(folder / "HumanEval.jsonl", "task_id")
    questions = _by_id(folder / "spec_bench_question.jsonl", "question_id")
    framed: dict[str, Callable[[Any], str]] = {
        "edit": lambda i: _rewrite(functions[i]),
        "summarization": lambda i: f"{questions[i]['turns'][0]}\n\nSummary:",
        "qa": lambda i: f"Question: {questions[i]['turns'][0]}\nAnswer:",
        "rag": lambda i: f"{questions[i]['turns'][0]}\n\nAnswer:",
    }
    ids = json.loads(IDS.read_text(encoding="utf-8"))
    return {kind: [framed[kind](i) for i in ids[kind]] for kind in ids}


def _by_id(file: Path, key: str) -> dict[Any, dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return {entry[key]: entry for entry in map(json.loads, lines)}


def _rewrite(function: dict[str, Any]) -> str:
    """A function, and its head once more under another name: the body is to be written again."""
    name, head = function["entry_point"], function["prompt"].rstrip("\n")
    body = function["canonical_solution"].strip("\n")
    return f"{head}\n{body}\n\n\n# The same function under another name.\n{head.replace(name, f'{name}_v2')}\n"


def repeated_share(prompt: Sequence[int], output: Sequence[int], size: int = 4) -> float:
    """The share of an output's n-grams that occurred before."""
    whole = [*prompt, *output]
    seen, repeated = {tuple(whole[i : i + size]) for i in range(len(prompt) - size + 1)}, 0
    starts = range(max(0, len(prompt) - size + 1), len(whole) - size + 1)
    for start in starts:
        gram = tuple(whole[start : start + size])
        repeated += gram in seen
        seen.add(gram)
    return repeated / len(starts)


def bare_copy(model: str, folder: Path) -> str:
    """The model without what lies beside it, as links in `folder`."""
    for file in find_model(model).iterdir():
        if file.name != BESIDE_MODEL:
            (folder / file.name).symlink_to(file.resolve())
    return str(folder)


def turn(config: EngineConfig, groups: Iterable[Group], mode: str, options: argparse.Namespace, back: bool) -> Engine:
    """Every group under both drafters, on a new engine; `back` lets the other one begin."""
    engine = Engine(config)
    params = SamplingParams(max_tokens=options.max_tokens, temperature=MODES[mode], seed=options.seed, ignore_eos=True)
    drafters = [PLAIN, engine.info.drafter][:: -1 if back else 1]
    for drafter in drafters:  # the first passes of anything are slow
        decode(engine, [(1,) * 40] * options.batch_size, drafter, options.batch_size, params)
    for group in groups:
        for drafter in drafters:
            run = decode(engine, group.prompts, drafter, options.batch_size, params)
            group.runs.setdefault((mode, drafter), []).append(run)
    return engine


def row(name: str, groups: Sequence[Group], mode: str, drafter: str) -> dict[str, Any]:
    """The figures of some groups together."""

    def seconds(which: str) -> float:
        return sum(statistics.median(run.seconds for run in group.runs[mode, which]) for group in groups)

    runs = [run for group in groups for run in group.runs[mode, drafter]]
    return {
        "mode": mode,
        "kind": name,
        "prompts": sum(len(group.prompts) for group in groups),
        "tokens_per_second": sum(run.tokens for run in runs) / len(groups[0].runs[mode, drafter]) / seconds(drafter),
        "ratio": seconds(PLAIN) / seconds(drafter),
        "tokens_per_step": sum(run.tokens for run in runs) / sum(run.steps for run in runs),
        "drafted": sum(count.drafted for run in runs for count in run.counts),
        "accepted": sum(count.accepted for run in runs for count in run.counts),
        "differing_outputs": sum(
            a != b
            for group in groups
            for run in group.runs[mode, drafter]
            for a, b in zip(run.outputs, group.runs[mode, PLAIN][0].outputs, strict=True)
        ),
    }


def main() -> int:
    options = _parse()
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=bare_copy(options.model, Path(folder)),
            enable_prefix_caching=False,
            num_threads=options.num_threads,
            max_num_seqs=max(32, options.batch_size),
        )
        engine = Engine(config)
        tokenizer, room = Tokenizer.load(engine.info.model_path), engine.info.max_model_len - options.max_tokens
        groups = [
            Group(kind, [tuple(tokenizer.encode(text)[-room:]) for text in prompts[start : start + options.batch_size]])
            for kind, prompts in texts(Path(options.data)).items()
            for start in range(0, len(prompts[: options.limit]), options.batch_size)
        ]
        for number in range(options.repeat):
            for mode in MODES:
                engine = turn(config, groups, mode, options, back=number % 2 == 1)
        drafter, machine = engine.info.drafter, describe_machine(engine)
    rows = []
    for mode in MODES:
        kinds = [(kind, [g for g in groups if g.kind == kind]) for kind in dict.fromkeys(g.kind for g in groups)]
        kinds += [
            ("what repeats", [g for g in groups if g.repeats(mode)]),
            ("what does not", [g for g in groups if not g.repeats(mode)]),
        ]
        rows += [row(name, part, mode, drafter) for name, part in kinds if part]
    for r in rows:
        print(
            f"{r['mode']:>15} {r['kind']:>13} {r['prompts']:>4} prompts {r['tokens_per_second']:>8.1f} tokens/s "
            f"{r['ratio']:>5.2f} times {PLAIN}, {r['tokens_per_step']:>5.2f} tokens/step, "
            f"{r['accepted']} of {r['drafted']} drafted accepted, {r['differing_outputs']} outputs differ"
        )
    print(json.dumps({"bench": "day_one", **vars(options), **machine, "drafter": drafter, "rows": rows}))
    return 1 if any(r["differing_outputs"] for r in rows) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default=BUILTIN_MODEL)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=int, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
