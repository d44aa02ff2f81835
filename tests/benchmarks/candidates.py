"""How many candidates of each row a draft must be chosen from: tokens per step by `NUM_CANDIDATES`.

    python tests/benchmarks/candidates.py HumanEval.jsonl [--adapter DIR] [--limit N]

A small vocabulary is scored whole; here that is held against what a large one gets, as if the
model's were large. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, chain
from skippy.engine.measure import decode, describe_machine, encode_prompts
from skippy.engine.prompts import read_prompts

COUNTS = (128, 256, 512, 1024)


def main() -> None:
    options = _parse()
    engine = Engine(EngineConfig(model=options.model, adapter=options.adapter, num_threads=options.threads))
    prompts = encode_prompts(engine, read_prompts(options.prompts, options.limit), options.max_tokens, options.prompts)
    rows = []
    whole_below = chain.WHOLE_BELOW
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=0, ignore_eos=True)
        for count in (None, *COUNTS):
            chain.WHOLE_BELOW, chain.NUM_CANDIDATES = (whole_below, 0) if count is None else (0, count)
            run = decode(engine, prompts, "s3d", 1, params, options.width)
            rows.append({"temperature": temperature, "candidates": count, "tokens_per_step": run.tokens / run.steps})
            print(
                f"temperature {temperature}, {count or 'all'} candidates: {run.tokens / run.steps:.2f} tokens per step"
            )
    print(json.dumps({"bench": "candidates", "options": vars(options), **describe_machine(engine), "rows": rows}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSONL file")
    parser.add_argument("--model", default=BUILTIN_MODEL, help="whose whole vocabulary is scored otherwise")
    parser.add_argument("--adapter")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=6, help="tokens drafted at most")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
