"""Would trees of drafts pay? What the best trees would accept, against what their rows cost.

    python tests/benchmarks/trees.py MODEL ADAPTER DATA [--nodes 4,6,8,12,16] [--threads N]

ADAPTER is a folder that `skippy train` wrote, DATA its data.safetensors. Along the held-out
texts, the rank of the token that came is looked up among the candidates of its draft row,
given the tokens before it: a node of a tree is a path of ranks, and the best tree of n nodes
holds the n paths that were met most often. A step's time is the measured draft pass plus a
measured verify pass of n + 1 rows of one sequence. That flatters trees: their attention and
their head, which go over every node, are not cheaper than a chain's. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from skippy.engine import Engine, EngineConfig, SamplingParams
from skippy.engine.adapter import S3DAdapter
from skippy.engine.adapter_files import load_adapter
from skippy.engine.measure import describe_machine
from skippy.engine.model import CausalLM
from skippy.engine.runner import Rows
from skippy.engine.sampling import SamplingState, exponential, fold, noise_bits
from skippy.engine.shape import full_plan, skipping_plan
from skippy.engine.training.data import Sample
from skippy.engine.training.files import load_samples
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.training.trainer import corrected_rows, hold_out
from skippy.engine.weights import load_model, open_checkpoint

CONTEXT = 256
RANKS = 32
"""Of a row's tokens, those looked at."""
Path_ = tuple[int, ...]


def main() -> int:
    options = _parse()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    cpu = torch.device("cpu")
    model = load_model(checkpoint, torch.float32, cpu, checkpoint.config.max_position_embeddings)
    adapter = load_adapter(Path(options.adapter), checkpoint, torch.float32, cpu)
    samples, _ = load_samples(Path(options.data))
    _, held_out = hold_out(samples, 1)
    engine = Engine(
        EngineConfig(model=options.model, device="cpu", adapter=options.adapter, num_threads=options.threads)
    )
    draft, verify = pass_times(engine, adapter, options.nodes)
    rows: list[dict[str, Any]] = []
    for mode, texts in (("greedy", held_out.greedy), ("temperature 0.8", held_out.sampled)):
        ranks = [token_ranks(model, adapter, sample) for sample in texts]
        for nodes in options.nodes:
            tree = best_tree(ranks, nodes)
            # A draft is no deeper than its rows; a chain of more nodes stays at that.
            chain = {(0,) * depth for depth in range(1, min(nodes, adapter.config.num_speculative_tokens) + 1)}
            for name, shape in (("chain", chain), ("tree", tree)):
                milliseconds = draft + verify[len(shape)]
                tokens = tokens_per_step(ranks, shape)
                rows.append(
                    {
                        "mode": mode,
                        "shape": name,
                        "nodes": len(shape),
                        "tokens_per_step": tokens,
                        "step_ms": milliseconds,
                        "tokens_per_ms": tokens / milliseconds,
                    }
                )
                print(
                    f"{mode:>16} {name:>6} {len(shape):>3} nodes {tokens:>6.2f} tokens/step {milliseconds:>6.2f} ms "
                    f"{1e3 * tokens / milliseconds:>6.0f} tokens/s"
                )
    print(json.dumps({"bench": "trees", **vars(options), **describe_machine(engine), "draft_ms": draft, "rows": rows}))
    return 0


@torch.no_grad()
def token_ranks(model: CausalLM, adapter: S3DAdapter, sample: Sample) -> list[Path_]:
    """For every place of a text, the ranks that its next tokens have in the draft's rows, while they are candidates."""
    width = adapter.config.num_speculative_tokens
    tokens = torch.tensor([sample.tokens])
    anchors = torch.arange(sample.start, len(sample.tokens) - width)[None]
    hidden = draft_rows(model, adapter, teach(model, adapter, tokens), anchors)[0]
    places = anchors[0][:, None] + torch.arange(width)
    corrected = corrected_rows(model, adapter, hidden, tokens[0][places])
    scores = model.logits(corrected.flatten(0, 1))
    params = SamplingParams(temperature=sample.temperature, seed=sample.seed)
    if not params.greedy:
        state = SamplingState(params, [], sample.seed, 0, (), scores.shape[1], scores.device)
        keys = [fold(state.key(place + 1)) for place in places.flatten().tolist()]
        noise = exponential(noise_bits(torch.tensor(keys).int()[:, None], torch.arange(scores.shape[1]).int()))
        scores = scores / params.temperature - noise.log().float()
    came = tokens[0][places + 1].flatten()
    rank = (scores > scores.gather(1, came[:, None])).sum(1).view(-1, width).tolist()
    return [tuple(_until(row, lambda r: r >= RANKS)) for row in rank]


def best_tree(texts: Sequence[Sequence[Path_]], nodes: int) -> set[Path_]:
    """The paths met most often; whatever begins a path is met more often than the path, so it is a tree."""
    met: Counter[Path_] = Counter()
    for text in texts:
        for path in text:
            met.update(path[:depth] for depth in range(1, len(path) + 1))
    return {path for path, _ in sorted(met.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:nodes]}


def tokens_per_step(texts: Sequence[Sequence[Path_]], tree: set[Path_]) -> float:
    """Along the decode of every text."""
    emitted = steps = 0
    for text in texts:
        place = 0
        while place < len(text):
            path = text[place]
            accepted = max((depth for depth in range(1, len(path) + 1) if path[:depth] in tree), default=0)
            place += accepted + 1
            emitted += accepted + 1
            steps += 1
    return emitted / steps


def pass_times(engine: Engine, adapter: S3DAdapter, nodes: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Milliseconds of a draft pass, and of verify passes by the number of drafted tokens; batch 1."""
    runner, config = engine.runner, adapter.config
    width, hidden_size = config.num_speculative_tokens, runner.model.config.hidden_size
    table = list(range(CONTEXT // runner.pool.block_size + 2))
    plan = skipping_plan(runner.model.config, config.skip_start, config.skip_end)
    draft = [Rows([1, *adapter.mask_ids(width - 1)], CONTEXT, table, width)]
    adapted = adapter.bind(torch.zeros(width, 2, hidden_size))

    def verify(count: int) -> Callable[[], object]:
        return lambda: runner.run([Rows([1] * (count + 1), CONTEXT, table, count + 1)], full_plan(runner.model.config))

    counts = sorted({*nodes, *range(1, width + 1)})
    return _milliseconds(lambda: runner.run(draft, plan, adapted)), {n: _milliseconds(verify(n)) for n in counts}


def _milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(60):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def _until(values: Sequence[int], ends: Callable[[int], bool]) -> Sequence[int]:
    return values[: next((place for place, value in enumerate(values) if ends(value)), len(values))]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("data")
    parser.add_argument("--nodes", type=lambda text: [int(n) for n in text.split(",")], default=[4, 6, 8, 12, 16])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
