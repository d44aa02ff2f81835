"""What the engine costs: Skippy without drafts against a bare loop and against transformers.

    python tests/benchmarks/baseline.py PROMPTS.jsonl [--limit N] [--max-tokens N] [--repeat N]

The bare loop is batch 1, greedy, over the same module: one static cache, no scheduler, no
sampling, no padding beyond what the module itself needs. All three emit the same number of
tokens for the same prompts, in turn; the median of the ratios counts. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from skippy.engine import Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.attention import SDPAAttention
from skippy.engine.kv import KVPool
from skippy.engine.measure import decode, describe_machine
from skippy.engine.shape import full_plan
from skippy.engine.tensors import Segment, TokenBatch


class BareLoop:
    """The least a decoder can do: a prompt's pass, then one row at a time, argmax."""

    def __init__(self, engine: Engine) -> None:
        self._model = engine.runner.model
        self._plan = full_plan(self._model.config)
        config, like = self._model.config, engine.runner.pool.keys
        blocks = -(-engine.info.max_model_len // engine.info.block_size)
        self._pool = KVPool(
            config.num_hidden_layers,
            blocks,
            engine.info.block_size,
            config.num_key_value_heads,
            config.head_dim,
            like.dtype,
            like.device,
        )
        self._attention = SDPAAttention(
            self._pool, config.num_attention_heads, engine.info.max_model_len, config.attention_scale
        )
        self._table = list(range(blocks))

    @torch.inference_mode()
    def generate(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        token = self._pass(list(prompt), 0)
        tokens = [token]
        for position in range(len(prompt), len(prompt) + max_tokens - 1):
            token = self._pass([token], position)
            tokens.append(token)
        return tokens

    def _pass(self, tokens: list[int], position: int) -> int:
        size, end = self._pool.block_size, position + len(tokens)
        starts = [position, *range((position // size + 1) * size, end, size)]
        segments = [
            Segment(s - position, min(end, (s // size + 1) * size) - s, s, self._table[: s // size + 1]) for s in starts
        ]
        slack = self._attention.rows_read(segments) - len(tokens)
        device = self._pool.keys.device
        ids = torch.tensor(tokens + [0] * slack, device=device)
        positions = torch.arange(position, end + slack, device=device)
        slots = positions.clone()
        slots[len(tokens) :] = self._pool.padding_slot
        batch = TokenBatch(ids, positions, slots, segments, torch.tensor([len(tokens) - 1], device=device))
        hidden, _ = self._model(batch, self._plan, self._attention.begin(segments, slots))
        return int(self._model.logits(hidden[batch.logit_rows]).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    engine = Engine(EngineConfig(enable_prefix_caching=False, dtype=options.dtype))
    tokenizer = Tokenizer.load(engine.info.model_path)
    with open(options.prompts, encoding="utf-8") as lines:
        prompts = [tuple(tokenizer.encode(json.loads(line)["prompt"])) for line in lines][: options.limit]
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0, ignore_eos=True)
    loop = BareLoop(engine)
    dtype = getattr(torch, engine.info.dtype)
    peer: Any = AutoModelForCausalLM.from_pretrained(engine.info.model_path, dtype=dtype)
    peer.to(engine.info.device).eval()

    def run_engine() -> list[list[int]]:
        return decode(engine, prompts, "none", 1, params).outputs

    def run_loop() -> list[list[int]]:
        return [loop.generate(prompt, options.max_tokens) for prompt in prompts]

    def run_transformers() -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=engine.info.device)
            outputs.append(
                peer.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.max_tokens,
                    min_new_tokens=options.max_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )[0, len(prompt) :].tolist()
            )
        return outputs

    sides: dict[str, Callable[[], list[list[int]]]] = {
        "engine": run_engine,
        "bare loop": run_loop,
        "transformers": run_transformers,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, list[list[int]]] = {}
    for turn in range(options.repeat + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            outputs[name] = side()
            if turn:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    assert outputs["engine"] == outputs["bare loop"], "the bare loop emits other tokens"
    tokens = len(prompts) * options.max_tokens
    for name, times in seconds.items():
        print(f"{name:>12}: {tokens / statistics.median(times):8.1f} tokens/s")
    ratios = {
        name: statistics.median(other / own for own, other in zip(seconds["engine"], seconds[name], strict=True))
        for name in ("bare loop", "transformers")
    }
    for name, ratio in ratios.items():
        print(f"the engine runs at {ratio:.2f} times the speed of {name}")
    record = {
        "bench": "baseline",
        "options": vars(options),
        **describe_machine(engine),
        "tokens_per_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "engine_to": ratios,
        "outputs_equal_to_transformers": sum(
            a == b for a, b in zip(outputs["engine"], outputs["transformers"], strict=True)
        ),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
