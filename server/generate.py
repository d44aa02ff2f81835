"""`skippy generate`: one prompt, the engine in this process, text as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from skippy.engine import (
    Engine,
    EngineConfig,
    EngineDead,
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
    for output in run(engine, Request("generate", token_ids, params)):
        count += len(output.token_ids)
        last = output
        sys.stdout.write("".join(map(detokenizer.push, output.token_ids)))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    sys.stdout.write(detokenizer.flush() + "\n")
    sys.stdout.flush()
    print(summary(last, count, seconds), file=sys.stderr)
    return 0


def run(engine: Engine, request: Request) -> Iterator[SequenceOutput]:
    """Every output of one request, the last of which has a finish reason.

    Raises:
        InvalidRequest: the engine refuses it.
        EngineDead: it failed on the way.
    """
    engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                raise EngineDead(output.error)
            yield output


def summary(last: SequenceOutput, count: int, seconds: float) -> str:
    """One line about a finished request; `seconds` includes the computation of the prompt."""
    counts = last.counts
    return (
        f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s), {count / max(1, counts.steps):.2f} tokens"
        f" per step, drafter {last.drafter}: {counts.drafted} drafted, {counts.accepted} accepted"
    )
