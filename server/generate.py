"""`skippy generate`: one prompt, the engine in this process, text as it comes."""

from __future__ import annotations

import sys
import time

from skippy.engine import (
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    SequenceOutput,
    Tokenizer,
)
from skippy.server.detokenize import Detokenizer


def generate(config: EngineConfig, prompt: str, params: SamplingParams) -> int:
    """Write the continuation of `prompt` to standard output, and what it took to standard error."""
    engine = Engine(config)
    tokenizer = Tokenizer.load(engine.info.model_path)
    token_ids = tuple(tokenizer.encode(prompt))
    detokenizer = Detokenizer(tokenizer, token_ids)
    count = 0
    started = time.perf_counter()
    request = Request("generate", token_ids, params)
    for output in (output for step in engine.run([request]) for output in step.outputs):
        count += len(output.token_ids)
        last = output
        sys.stdout.write("".join(map(detokenizer.push, output.token_ids)))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    sys.stdout.write(detokenizer.flush() + "\n")
    sys.stdout.flush()
    print(summary(last, count, seconds), file=sys.stderr)
    return 0


def summary(last: SequenceOutput, count: int, seconds: float) -> str:
    """One line about a finished request; `seconds` includes the computation of the prompt."""
    counts = last.counts
    return (
        f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s), {count / max(1, counts.steps):.2f} tokens"
        f" per step, drafter {last.drafter}: {counts.drafted} drafted, {counts.accepted} accepted"
    )
