"""Where drafts of s3d should end: speed and tokens per step by `MIN_REACH`, on prompts of a file.

    python tests/benchmarks/min_reach.py HumanEval.jsonl [--adapter DIR] [--skip N] [--limit N]

Each turn decodes the prompts without drafting and then with every threshold and draft length.
JSON on the last line: medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams
from skippy.engine.drafters import s3d
from skippy.engine.measure import decode, encode_prompts
from skippy.engine.prompts import read_prompts

THRESHOLDS = (0.3, 0.2, 0.1, 0.05, 0.0)
WIDTHS = (4, 6)


def main() -> None:
    options = _parse()
    engine = Engine(EngineConfig(model=options.model, adapter=options.adapter, num_threads=options.threads))
    texts = read_prompts(options.prompts, options.skip + options.limit)[options.skip :]
    prompts = encode_prompts(engine, texts, options.max_tokens, options.prompts)
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    per_step: dict[str, float] = {}
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=0, ignore_eos=True)
        decode(engine, prompts[:1], "s3d", 1, params, WIDTHS[-1])
        for _ in range(options.repeat):
            plain = decode(engine, prompts, "none", 1, params)
            for threshold in THRESHOLDS:
                s3d.MIN_REACH = threshold
                for width in WIDTHS:
                    run = decode(engine, prompts, "s3d", 1, params, width)
                    assert run.outputs == plain.outputs
                    name = f"temperature {temperature}, MIN_REACH {threshold}, s3d:{width}"
                    ratios[name].append(plain.seconds / run.seconds)
                    per_step[name] = run.tokens / sum(counts.steps for counts in run.counts)
    rows = {name: (statistics.median(values), per_step[name]) for name, values in ratios.items()}
    for name, (ratio, tokens) in rows.items():
        print(f"{name}: {ratio:.2f} times none, {tokens:.2f} tokens per step")
    print(json.dumps({"bench": "min_reach", **vars(options), "rows": rows}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSONL file")
    parser.add_argument("--model", default=BUILTIN_MODEL)
    parser.add_argument("--adapter")
    parser.add_argument("--skip", type=int, default=20, help="prompts at the beginning")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
