"""An engine process without a model, for tests of the server: the prompt is its own continuation.

It speaks the pipe protocol of skippy.engine.messages. Every choice repeats the prompt's
tokens from the start; num_speculative_tokens + 1 of them come in one step. A command line
option asks for each kind of trouble.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from skippy.engine import DraftCounts, EngineInfo, Request, SequenceOutput, StepOutput, StepStats, TokenLogprobs
from skippy.engine.messages import (
    Abort,
    Add,
    Command,
    Event,
    Fatal,
    FrameReader,
    Loading,
    Ready,
    Start,
    Stepped,
    encode,
)
from skippy.engine.types import FinishReason

BUILTIN = Path(__file__).parents[1] / "engine" / "builtin"
EOS = 0
BLOCKS = 100


@dataclass
class Choice:
    request: Request
    index: int
    emitted: list[int] = field(default_factory=list)
    counts: DraftCounts = field(default_factory=DraftCounts)


def logprobs(token_id: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [(token_id, -0.5), (token_id + 1, -1.5), (token_id + 2, -2.5)][:count])


def advance(choice: Choice) -> SequenceOutput:
    """One step of one choice."""
    request, params = choice.request, choice.request.params
    prompt, first = request.prompt_token_ids, not choice.counts.steps
    tokens: list[int] = []
    finish: FinishReason | None = None
    while len(tokens) < (request.num_speculative_tokens or 0) + 1 and finish is None:
        done = len(choice.emitted) + len(tokens)
        if done == params.max_tokens:
            finish = "length"
            break
        tokens.append(prompt[done % len(prompt)])
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, EOS)
        if tokens[-1] in stops:
            finish = "stop"
        elif done + 1 == params.max_tokens:
            finish = "length"
    choice.emitted += tokens
    choice.counts.steps += 1
    choice.counts.drafted += request.num_speculative_tokens or 0
    choice.counts.accepted += max(len(tokens) - 1, 0)
    prompt_logprobs = None
    if first and params.prompt_logprobs is not None:
        prompt_logprobs = [None, *(logprobs(token, params.prompt_logprobs) for token in prompt[1:])]
    return SequenceOutput(
        request_id=request.request_id,
        index=choice.index,
        token_ids=tokens,
        counts=choice.counts,
        drafter=request.drafter or "ngram",
        logprobs=None if params.logprobs is None else [logprobs(token, params.logprobs) for token in tokens],
        prompt_logprobs=prompt_logprobs,
        cached_tokens=len(prompt) // 16 * 16,
        finish_reason=finish,
        stop_reason=tokens[-1] if finish == "stop" and tokens[-1] in params.stop_token_ids else None,
    )


class Stub:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.choices: list[Choice] = []
        self.steps = 0

    def add(self, request: Request) -> StepOutput:
        self.choices += [Choice(request, index) for index in range(request.n)]
        return self.output([], 0)

    def abort(self, request_id: str, index: int | None) -> StepOutput:
        self.choices = [
            choice
            for choice in self.choices
            if choice.request.request_id != request_id or index not in (None, choice.index)
        ]
        return self.output([], 0)

    def step(self) -> StepOutput:
        self.steps += 1
        if self.options.die_at_step == self.steps:
            os.kill(os.getpid(), 9)
        if self.options.fail_at_step == self.steps:
            failed = self.choices.pop(0)
            error = SequenceOutput(
                failed.request.request_id, failed.index, [], failed.counts, "ngram", finish_reason="error", error="stub"
            )
            return self.output([error], 0)
        outputs = [advance(choice) for choice in self.choices]
        finished = {(output.request_id, output.index) for output in outputs if output.finish_reason}
        self.choices = [c for c in self.choices if (c.request.request_id, c.index) not in finished]
        return self.output(outputs, sum(len(output.token_ids) for output in outputs))

    def output(self, outputs: list[SequenceOutput], tokens: int) -> StepOutput:
        accepted = [max(len(output.token_ids) - 1, 0) for output in outputs]
        stats = StepStats(
            verify_seconds=0.01,
            host_seconds=0.001,
            running=len(self.choices),
            kv_blocks_used=len(self.choices),
            kv_blocks_total=BLOCKS,
            generation_tokens=tokens,
            drafts=sum(count > 0 for count in accepted),
            draft_tokens=sum(accepted),
            accepted_tokens=sum(accepted),
            accepted_per_pos=[sum(count > j for count in accepted) for j in range(max(accepted, default=0))],
            accepted_per_step=[count for count in accepted if count],
            decode_sequences=sum(bool(output.token_ids) for output in outputs),
        )
        return StepOutput(outputs, stats)


def info(max_model_len: int = 256, model_path: Path = BUILTIN) -> EngineInfo:
    return EngineInfo(
        model="builtin",
        model_path=str(model_path),
        device="cpu",
        dtype="float32",
        quantization="none",
        vocab_size=8192,
        max_model_len=max_model_len,
        bos_token_id=EOS,
        eos_token_ids=[EOS],
        drafter="ngram",
        drafters=["none", "ngram"],
        num_speculative_tokens=4,
        max_speculative_tokens=8,
        block_size=16,
        num_blocks=BLOCKS,
        kv_bytes=2**20,
        max_num_seqs=4,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--fatal", help="fail to load, with this message")
    parser.add_argument("--die-at-step", type=int, help="SIGKILL itself in this step")
    parser.add_argument("--fail-at-step", type=int, help="answer one choice with an error in this step")
    parser.add_argument("--garbage", action="store_true", help="send what is no message instead of getting ready")
    parser.add_argument("--deaf", action="store_true", help="do not end when the command pipe closes")
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--model-path", type=Path, default=BUILTIN)
    parser.add_argument("read_fd", type=int)
    parser.add_argument("write_fd", type=int)
    return parser.parse_args()


def main() -> int:
    options = parse()
    reader, stub = FrameReader(Command), Stub(options)

    def send(event: Event) -> None:
        data = encode(event)
        while data:
            data = data[os.write(options.write_fd, data) :]

    while True:
        busy = bool(stub.choices)
        if not busy or select.select([options.read_fd], [], [], options.step_seconds)[0]:
            data = os.read(options.read_fd, 65536)
            if not data:
                time.sleep(60.0 if options.deaf else 0.0)
                return 0
            for command in reader.feed(data):
                match cast(Command, command):
                    case Start():
                        send(Loading(1, 4))
                        time.sleep(options.load_seconds)
                        if options.fatal:
                            send(Fatal(options.fatal))
                            return 2
                        if options.garbage:
                            os.write(options.write_fd, b"\x01\x00\x00\x00\xff")
                        send(Ready(info(options.max_model_len, options.model_path)))
                    case Add(request):
                        send(Stepped(stub.add(request)))
                    case Abort(request_id, index):
                        send(Stepped(stub.abort(request_id, index)))
        elif busy:
            send(Stepped(stub.step()))


if __name__ == "__main__":
    sys.exit(main())
