"""A real server under 32 streams that come and go, and what is left of it afterwards.

    python tests/benchmarks/soak.py [--seconds N] [--clients N] [--model MODEL]

Starts `skippy serve`, times its first answer, lets the clients stream with random options
and hang up at random, then checks that no KV block, thread, process or descriptor is
left behind, and that start and memory keep their limits. At last it kills the engine in
mid-stream: every client must hear of it, and /health must answer 503. JSON on the last
line; exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil

PROMPTS = ("def fibonacci(n):\n", "import os\n\n", "class Stack:\n    def __init__(self):\n", "x = [1, 2, 3]\n" * 20)
READY_SECONDS = 60.0
FIRST_ANSWER_SECONDS = 10.0
SERVER_MB = 150.0
ALL_MB = 1000.0


class Soak:
    """One server process and what is known of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "skippy.server.cli", "serve", options.model, "--port", str(port)]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command)
        self.server = psutil.Process(self.process.pid)
        self.url = f"http://127.0.0.1:{port}"
        self.findings: list[str] = []
        self.streams = self.disconnects = 0

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60.0, limits=httpx.Limits(max_connections=None))

    async def first_answer(self) -> float:
        """Seconds from the start of the process to its first completion."""
        body = {"prompt": PROMPTS[0], "max_tokens": 1}
        async with self.client() as http:
            while True:
                try:
                    if (await http.post("/v1/completions", json=body)).status_code == 200:
                        return time.monotonic() - self.started
                except httpx.TransportError:
                    pass
                if self.process.poll() is not None or time.monotonic() - self.started > READY_SECONDS:
                    raise SystemExit("the server did not come up")
                await asyncio.sleep(0.02)

    def body(self) -> dict[str, Any]:
        r = self.random
        return {
            "prompt": r.choice(PROMPTS),
            "max_tokens": r.randint(1, 200),
            "temperature": r.choice([0, 0.8]),
            "n": r.choice([1, 1, 1, 2]),
            "frequency_penalty": r.choice([0, 0.3]),
            "stop": r.choice([None, ["\n\n"]]),
            "skippy": {"drafter": r.choice([None, "none", "ngram", "s3d"])},
            "stream": True,
        }

    async def one_client(self, until: float) -> None:
        async with self.client() as http:
            while time.monotonic() < until:
                leave_after = self.random.choice([None, self.random.randint(0, 40)])
                async with http.stream("POST", "/v1/completions", json=self.body()) as answer:
                    if answer.status_code != 200:
                        self.findings.append(f"status {answer.status_code}: {(await answer.aread()).decode()}")
                        return
                    self.streams += 1
                    finished = False
                    events = 0
                    async for line in answer.aiter_lines():
                        finished = finished or line == "data: [DONE]"
                        events += line.startswith("data: ")
                        if leave_after is not None and events > leave_after:
                            self.disconnects += 1
                            break
                    else:
                        if not finished:
                            self.findings.append("a stream ended without [DONE]")

    async def metric(self, name: str) -> float:
        async with self.client() as http:
            for line in (await http.get("/metrics")).text.splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise KeyError(name)

    async def settle(self) -> None:
        """Wait until nothing runs; report it if that never happens."""
        for _ in range(200):
            if await self.metric("skippy_requests_running") == 0 and await self.metric("skippy_requests_waiting") == 0:
                break
            await asyncio.sleep(0.05)
        else:
            self.findings.append("requests still run after every client has left")
        if held := await self.metric("skippy_kv_cache_usage_ratio"):
            self.findings.append(f"KV blocks are held by nobody: {held:.1%}")

    def footprint(self) -> dict[str, int]:
        processes = [self.server, *self.server.children(recursive=True)]
        return {
            "processes": len(processes),
            "threads": sum(p.num_threads() for p in processes),
            "descriptors": sum(p.num_fds() for p in processes),
        }

    def memory_mb(self) -> dict[str, float]:
        children = self.server.children(recursive=True)
        own = self.server.memory_info().rss
        return {"server": own / 1e6, "all": (own + sum(p.memory_info().rss for p in children)) / 1e6}

    async def doomed_client(self, under_way: asyncio.Event) -> bool:
        """Whether a client in mid-stream hears that the engine is gone."""
        async with self.client() as http:
            body = {"prompt": PROMPTS[1], "max_tokens": 1900, "ignore_eos": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    under_way.set()
                    if line.startswith("data: {") and "error" in json.loads(line.removeprefix("data: ")):
                        return True
        return False

    async def kill_engine(self) -> None:
        events = [asyncio.Event() for _ in range(8)]
        clients = [asyncio.create_task(self.doomed_client(event)) for event in events]
        await asyncio.gather(*(event.wait() for event in events))
        (engine,) = self.server.children()
        engine.send_signal(signal.SIGKILL)
        heard = await asyncio.gather(*clients)
        if not all(heard):
            self.findings.append(f"{heard.count(False)} clients did not hear that the engine died")
        async with self.client() as http:
            health = await http.get("/health")
            late = await http.post("/v1/completions", json={"prompt": "x"})
        if health.status_code != 503 or late.status_code != 503:
            self.findings.append(
                f"after the engine's death: /health {health.status_code}, a request {late.status_code}"
            )

    async def run(self) -> dict[str, Any]:
        first_answer = await self.first_answer()
        warm_up = time.monotonic() + min(5.0, self.options.seconds)
        await asyncio.gather(*(self.one_client(warm_up) for _ in range(self.options.clients)))
        await self.settle()
        before, memory_before = self.footprint(), self.memory_mb()
        until = time.monotonic() + self.options.seconds
        await asyncio.gather(*(self.one_client(until) for _ in range(self.options.clients)))
        await self.settle()
        after, memory_after = self.footprint(), self.memory_mb()
        if first_answer > FIRST_ANSWER_SECONDS:
            self.findings.append(f"the first answer took {first_answer:.1f} s")
        if memory_after["server"] > SERVER_MB or memory_after["all"] > ALL_MB:
            self.findings.append(f"too much memory: {memory_after}")
        if after != before:
            self.findings.append(f"left behind: {before} before, {after} after")
        await self.kill_engine()
        return {
            "first_answer_seconds": first_answer,
            "streams": self.streams,
            "disconnects": self.disconnects,
            "footprint": after,
            "memory_mb_before": memory_before,
            "memory_mb_after": memory_after,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--seed", type=int, default=0)
    soak = Soak(parser.parse_args())
    try:
        record = asyncio.run(soak.run())
    finally:
        soak.process.terminate()
        soak.process.wait(30)
    for key, value in record.items():
        print(f"{key}: {value}")
    for finding in soak.findings:
        print(f"FOUND: {finding}")
    print(json.dumps({"bench": "soak", "options": vars(soak.options), **record, "findings": soak.findings}))
    return 1 if soak.findings else 0


if __name__ == "__main__":
    sys.exit(main())
