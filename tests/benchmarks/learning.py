"""`skippy serve --learn` under replayed traffic: how fast it learns, and what live requests feel of it.

    python tests/benchmarks/learning.py PROMPTS.jsonl [--minutes N] [--plain-minutes N] [--busy X]

One client sends prompt after prompt, in turn greedy and at temperature 0.8, and pauses between
them so that about the share `--busy` of the time is spent on answers. At first a server without
adapter or learning answers for some minutes, then one that learns, with the built-in model's
adapter removed. Told are the median latencies, those of the first minutes of learning apart (later
drafts make up for it), and tokens per step: of live requests as it learns, and in the end of what
was learnt beside the adapter that the model is shipped with, on the same prompts, decoded anew.
JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, read_prompts
from skippy.engine.adapter_files import BESIDE_MODEL
from skippy.engine.hub import find_model
from skippy.engine.measure import decode, encode_prompts

NAME = "replayed"
MAX_TOKENS = 128
TEMPERATURES = (0.0, 0.8)
READY_SECONDS = 60.0
FIRST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """When it was asked for, in seconds since the client began, how long it took, and its tokens and steps."""

    at: float
    seconds: float
    tokens: int
    steps: int
    temperature: float


@contextmanager
def server(*flags: str) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "skippy.server.cli", "serve", *flags, "--port", str(port)]
    process = subprocess.Popen([*command, "--served-model-name", NAME])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as http:
            began = time.monotonic()
            while True:
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                    raise SystemExit("the server did not come up")
                time.sleep(0.1)
            yield http
    finally:
        process.terminate()
        process.wait(30)


def replay(http: httpx.Client, prompts: list[str], minutes: float, busy: float) -> list[Answer]:
    """Requests one after the other, the same ones for the same arguments but for their number."""
    chooser, answers, began = random.Random(0), [], time.monotonic()
    number = 0
    while time.monotonic() - began < 60 * minutes:
        temperature = TEMPERATURES[number % 2]
        body = {
            "model": NAME,
            "prompt": prompts[number % len(prompts)],
            "max_tokens": MAX_TOKENS,
            "temperature": temperature,
            "seed": number,
        }
        asked = time.monotonic()
        response = http.post("/v1/completions", json=body)
        response.raise_for_status()
        seconds = time.monotonic() - asked
        usage = response.json()["usage"]
        steps = usage["skippy"]["steps"]
        answers.append(Answer(asked - began, seconds, usage["completion_tokens"], steps, temperature))
        typical = statistics.median(answer.seconds for answer in answers[-20:])
        time.sleep(chooser.expovariate(1.0) * typical * (1.0 - busy) / busy)
        number += 1
    return answers


def tokens_per_step(model: str, adapter: str | None, prompts: list[str]) -> float:
    """Of whole drafts, half of the outputs greedy and half at temperature 0.8."""
    engine = Engine(EngineConfig(model=model, adapter=adapter, enable_prefix_caching=False, num_threads=1))
    encoded = encode_prompts(engine, prompts, MAX_TOKENS, "the prompts")
    tokens = steps = 0
    for temperature in TEMPERATURES:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=12345, ignore_eos=True)
        run = decode(engine, encoded, "s3d", 16, params, engine.drafting.widest("s3d"))
        tokens, steps = tokens + run.tokens, steps + run.steps
    return tokens / steps


def median_of(answers: list[Answer], temperature: float | None = None) -> float:
    return statistics.median(a.seconds for a in answers if temperature in (None, a.temperature))


def of_requests(answers: list[Answer]) -> float:
    return sum(a.tokens for a in answers) / sum(a.steps for a in answers)


def main() -> None:
    options = _parse()
    prompts = read_prompts(options.prompts)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "model"
        bare.mkdir()
        for file in find_model(BUILTIN_MODEL).iterdir():
            if file.name != BESIDE_MODEL:
                (bare / file.name).symlink_to(file.resolve())
        with server(str(bare), "--drafter", "none") as http:
            plain = replay(http, prompts, options.plain_minutes, options.busy)
        learnt = str(Path(options.output or f"{folder}/learnt"))
        with server(str(bare), "--drafter", "s3d", "--learn", learnt) as http:
            answers = replay(http, prompts, options.minutes, options.busy)
        baseline = median_of(plain)
        first = [a for a in answers if a.at < FIRST_SECONDS]
        print(f"without learning: {len(plain)} requests, median {baseline * 1e3:.0f} ms")
        minutes = max(1, int(options.minutes) // 10)
        for minute in range(0, int(options.minutes), minutes):
            part = [a for a in answers if minute <= a.at / 60 < minute + minutes]
            if part:
                latency = median_of(part)
                told = f"median {latency * 1e3:.0f} ms, {of_requests(part):.2f} tokens per step"
                print(f"from minute {minute}: {len(part)} requests, {told}")
        record = {
            "bench": "learning",
            **vars(options),
            "requests": len(answers),
            "busy_share": sum(a.seconds for a in answers) / (60 * options.minutes),
            "median_plain": baseline,
            "median_first": median_of(first),
            "median": median_of(answers),
            "of_plain_by_temperature": {t: median_of(answers, t) / median_of(plain, t) for t in TEMPERATURES},
            "live_tokens_per_step": of_requests(answers[-len(prompts) :]),
            "learnt": tokens_per_step(str(bare), learnt, prompts),
            "shipped": tokens_per_step(BUILTIN_MODEL, None, prompts),
        }
    print(
        f"median latency: {record['median_first'] / baseline:.2f} of plain in the first minutes, "
        f"{record['median'] / baseline:.2f} in all; learnt {record['learnt']:.2f} tokens per step, shipped "
        f"{record['shipped']:.2f}: {record['learnt'] / record['shipped']:.0%}"
    )
    print(json.dumps(record))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--plain-minutes", type=float, default=3.0)
    parser.add_argument("--busy", type=float, default=0.3)
    parser.add_argument("--output", help="folder to learn into; unset: a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
