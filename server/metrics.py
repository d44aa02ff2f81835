"""What an operator can see: Prometheus metrics and a log line under load."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from skippy.engine import StepStats

logger = logging.getLogger(__name__)

PHASES = ("draft", "verify", "prefill", "host")
_TOKENS = tuple(float(count) for count in range(33))  # as many as one step may draft
_STEP_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0)
_TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 5.0)
_WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(slots=True)
class _Load:
    """What the steps since the last log line did."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    decode_sequences: int = 0
    drafts: int = 0
    draft_tokens: int = 0

    def add(self, stats: StepStats) -> None:
        self.prompt_tokens += stats.prompt_tokens
        self.generation_tokens += stats.generation_tokens
        self.decode_sequences += stats.decode_sequences
        self.drafts += stats.drafts
        self.draft_tokens += stats.draft_tokens


class Metrics:
    """The metrics of one server, in a registry of their own; every name begins with skippy_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="skippy", registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, namespace="skippy", registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace="skippy", registry=registry, buckets=buckets)

        self._drafts = counter("spec_decode_num_drafts", "Drafts verified.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafts whose token at this position was accepted.", "position"
        )
        self._per_step = histogram("accepted_tokens_per_step", "Tokens accepted of one draft.", _TOKENS)
        self._running = gauge("requests_running", "Sequences that the engine is computing.")
        self._waiting = gauge("requests_waiting", "Sequences that wait for a place in the engine.")
        self._kv_usage = gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks that are in use.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed; those found in the cache are not.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._requests = counter("requests", "Sequences that ended, by reason.", "finish_reason")
        self._preemptions = counter("preemptions", "Sequences put back to make room for older ones.")
        self._first_token = histogram("time_to_first_token_seconds", "From request to first token.", _WAIT_SECONDS)
        self._inter_token = histogram("inter_token_latency_seconds", "Time per token after the first.", _TOKEN_SECONDS)
        self._request = histogram("request_seconds", "From request to end of the answer.", _REQUEST_SECONDS)
        self._step = histogram("step_seconds", "One engine step, by phase.", _STEP_SECONDS, "phase")
        for phase in PHASES:
            self._step.labels(phase)
        for reason in ("stop", "length", "abort", "error"):
            self._requests.labels(reason)
        self._load = _Load()
        self._last = StepStats()

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe_step(self, stats: StepStats) -> None:
        """Count one engine step."""
        self._drafts.inc(stats.drafts)
        self._draft_tokens.inc(stats.draft_tokens)
        self._accepted.inc(stats.accepted_tokens)
        for position, count in enumerate(stats.accepted_per_pos):
            self._accepted_at.labels(position).inc(count)
        for count in stats.accepted_per_step:
            self._per_step.observe(count)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(_ratio(stats.kv_blocks_used, stats.kv_blocks_total))
        self._last = stats
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generation_tokens.inc(stats.generation_tokens)
        self._preemptions.inc(stats.preemptions)
        for phase in PHASES:
            seconds = getattr(stats, f"{phase}_seconds")
            if seconds:  # a phase that the step did not have is no observation of it
                self._step.labels(phase).observe(seconds)
        self._load.add(stats)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def observe_tokens(self, seconds: float, count: int) -> None:
        """`count` further tokens of one sequence came together, `seconds` after the ones before."""
        for _ in range(count):
            self._inter_token.observe(seconds / count)

    def observe_finish(self, reason: str) -> None:
        """One sequence ended; "abort" is the client leaving."""
        self._requests.labels(reason).inc()

    def observe_request(self, seconds: float) -> None:
        self._request.observe(seconds)

    async def log_load(self, interval: float) -> None:
        """Log one line per interval, in seconds, in which the engine had work. Never returns."""
        while True:
            start = time.monotonic()
            await asyncio.sleep(interval)
            line = self.take_load_line(time.monotonic() - start)
            if line is not None:
                logger.info("%s", line)

    def take_load_line(self, seconds: float) -> str | None:
        """What the engine did since the last call; None if it was idle."""
        load, last = self._load, self._last
        self._load = _Load()
        if not load.prompt_tokens and not load.generation_tokens:
            return None
        return (
            f"{load.generation_tokens / seconds:.1f} tokens/s, "
            f"{_ratio(load.generation_tokens, load.decode_sequences):.2f} tokens per step, "
            f"\N{GREEK SMALL LETTER GAMMA} {_ratio(load.draft_tokens, load.drafts):.1f}, "
            f"{last.running} running, {last.waiting} waiting, "
            f"KV {100 * _ratio(last.kv_blocks_used, last.kv_blocks_total):.1f} %"
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
