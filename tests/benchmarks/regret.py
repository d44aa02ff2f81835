"""What the controller misses against the best fixed draft length, in simulation and in an engine.

    python tests/benchmarks/regret.py --simulated [--draws N]
    python tests/benchmarks/regret.py [--clients 1 4 16 32] [--temperatures 0 0.8] [--drafters s3d hybrid] [--repeat N]

Simulated: every machine, text and load of tests/support_control.py, on a counted clock. Every
trace is drawn N times, with other noise, texts and arrivals of the same kind, and its regret is
the mean of theirs, each against the width that is best in that draw.

Live: the built-in model, in this process. At every number of clients and temperature all plans
run on the same prompts in turn: the drafter under the controller, with every fixed length, and
no drafts at all, every second turn in reverse order. The controller starts knowing nothing, but
keeps what it learnt from turn to turn. A plan's speed is held against the controller's in the
same turn, because neighbours in time share the machine's moods: many short turns (--repeat,
--requests) say more than a few long ones. Regret is 1 - 1 / the best plan's median of these
ratios; it is picked afterwards, so noise alone makes it larger than 0. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from record_drafts import OPENINGS

from skippy.engine import Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.bench import DraftPlan
from skippy.engine.controller import Controller
from skippy.engine.measure import decode, describe_machine
from skippy.engine.prompts import read_prompts

PER_CLIENT = 2
"""Requests of each client at least."""


def simulate(draws: int) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support_control import CLIENTS, MACHINES, TEXTS, Trace  # noqa: PLC0415

    rows = []
    for machine in MACHINES:
        for clients in CLIENTS:
            for text in TEXTS:
                traces = [Trace(machine, text, clients, draw=draw) for draw in range(draws)]
                of_draws = [trace.regret(Controller(trace.most)) for trace in traces]
                regret = statistics.mean(of_draws)
                row = {"machine": machine, "clients": clients, "text": text, "regret": regret, "of_draws": of_draws}
                rows.append(row)
                load = f"{clients} clients" if clients else "1 to 32 clients"
                least, most = min(of_draws), max(of_draws)
                print(f"{machine:12s} {load:16s} {text:18s} {regret:7.2%} ({least:.2%} to {most:.2%})", flush=True)
    return {"bench": "regret, simulated", "rows": rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for drafter in options.drafters:
        for temperature in options.temperatures:
            for clients in options.clients:
                row = {"drafter": drafter, "temperature": temperature, "clients": clients}
                # A new engine, so that nothing is known yet; a cached prompt would favour the later turns.
                engine = Engine(EngineConfig(enable_prefix_caching=False, num_threads=options.num_threads))
                rows.append(row | compare(engine, drafter, temperature, clients, options))
                best, regret = rows[-1]["best"], rows[-1]["regret"]
                print(
                    f"{drafter:8s} T {temperature:<4} {clients:3d} clients  best {best:10s} {regret:7.2%}", flush=True
                )
    return {"bench": "regret, live", "options": vars(options), **describe_machine(engine), "rows": rows}


def compare(
    engine: Engine, drafter: str, temperature: float, clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of every plan in every turn, and the controller's regret."""
    tokenizer = Tokenizer.load(engine.info.model_path)
    texts = read_prompts(options.prompts) if options.prompts else OPENINGS
    wanted = max(options.requests, PER_CLIENT * clients)
    prompts = [tuple(tokenizer.encode(texts[place % len(texts)])) for place in range(wanted)]
    params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=0, ignore_eos=True)
    chosen = DraftPlan(drafter)
    plans = [
        DraftPlan("none"),
        *(DraftPlan(drafter, width) for width in range(1, engine.drafting.widest(drafter) + 1)),
        chosen,
    ]
    rates: dict[DraftPlan, list[float]] = {plan: [] for plan in plans}
    decode(engine, prompts[:clients], "none", clients, params)
    for turn in range(options.repeat):
        for plan in plans[:: -1 if turn % 2 else 1]:
            run = decode(engine, prompts, plan.drafter, clients, params, plan.num_speculative_tokens)
            rates[plan].append(run.tokens / run.seconds)
    of_controller = rates.pop(chosen)
    ratios = {
        str(plan): statistics.median(rate / own for rate, own in zip(turns, of_controller, strict=True))
        for plan, turns in rates.items()
    }
    best = max(ratios, key=lambda plan: ratios[plan])
    return {
        "tokens_per_second": {str(plan): turns for plan, turns in [*rates.items(), (chosen, of_controller)]},
        "to_controller": ratios,
        "best": best,
        "regret": 1.0 - 1.0 / ratios[best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--draws", type=int, default=5, help="of every simulated trace")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--drafters", nargs="+", default=["s3d", "hybrid"])
    parser.add_argument("--prompts", help="JSONL; unset: a few openings of Python files")
    parser.add_argument("--requests", type=int, default=16, help=f"at least, and {PER_CLIENT} per client")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--num-threads", type=int)
    options = parser.parse_args()
    record = simulate(options.draws) if options.simulated else measure(options)
    worst = max(record["rows"], key=lambda row: row["regret"])
    print(f"worst of {len(record['rows'])}: {worst['regret']:.2%}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
