"""Every metric under its documented name, and the line of the log."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skippy.engine import StepStats
from skippy.server.metrics import Metrics

STATS = StepStats(
    draft_seconds=0.003,
    verify_seconds=0.01,
    host_seconds=0.001,
    running=3,
    waiting=2,
    kv_blocks_used=25,
    kv_blocks_total=100,
    prompt_tokens=7,
    generation_tokens=8,
    drafts=2,
    draft_tokens=8,
    accepted_tokens=5,
    accepted_per_pos=[2, 1, 1, 1],
    accepted_per_step=[4, 1],
    decode_sequences=3,
    preemptions=1,
)

COUNTS = {
    "skippy_spec_decode_num_drafts_total": 2,
    "skippy_spec_decode_num_draft_tokens_total": 8,
    "skippy_spec_decode_num_accepted_tokens_total": 5,
    "skippy_spec_decode_num_accepted_tokens_per_pos_total{position=0}": 2,
    "skippy_spec_decode_num_accepted_tokens_per_pos_total{position=3}": 1,
    "skippy_accepted_tokens_per_step_count": 2,
    "skippy_accepted_tokens_per_step_sum": 5,
    "skippy_requests_running": 3,
    "skippy_requests_waiting": 2,
    "skippy_prompt_tokens_total": 7,
    "skippy_generation_tokens_total": 8,
    "skippy_preemptions_total": 1,
    "skippy_kv_cache_usage_ratio": 0.25,
    "skippy_step_seconds_sum{phase=draft}": 0.003,
    "skippy_step_seconds_sum{phase=verify}": 0.01,
    "skippy_step_seconds_count{phase=prefill}": 0,
    "skippy_step_seconds_count{phase=host}": 1,
    "skippy_requests_total{finish_reason=stop}": 1,
    "skippy_requests_total{finish_reason=abort}": 0,
    "skippy_time_to_first_token_seconds_sum": 0.5,
    "skippy_inter_token_latency_seconds_sum": 0.75,
    "skippy_inter_token_latency_seconds_count": 3,
    "skippy_request_seconds_sum": 1.25,
}


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_every_metric_has_its_name_and_value() -> None:
    metrics = Metrics()
    metrics.observe_step(STATS)
    metrics.observe_first_token(0.5)
    metrics.observe_tokens(0.75, 3)
    metrics.observe_finish("stop")
    metrics.observe_request(1.25)
    found = samples(metrics)
    assert {name: found[name] for name in COUNTS} == pytest.approx(COUNTS)
    assert all(name.startswith("skippy_") for name in found)
    assert not any("total_total" in name or "skippy_skippy" in name for name in found)


def test_the_longest_draft_has_a_bucket() -> None:
    metrics = Metrics()
    metrics.observe_step(StepStats(accepted_per_step=[31, 32]))
    found = samples(metrics)
    assert found["skippy_accepted_tokens_per_step_bucket{le=31.0}"] == 1
    assert found["skippy_accepted_tokens_per_step_bucket{le=32.0}"] == 2


def test_two_servers_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.observe_step(STATS)
    assert samples(other)["skippy_generation_tokens_total"] == 0


def test_the_load_line_covers_the_steps_since_the_last_one() -> None:
    metrics = Metrics()
    assert metrics.take_load_line(10) is None
    for _ in range(5):
        metrics.observe_step(STATS)
    line = metrics.take_load_line(10)
    assert line == (
        "4.0 tokens/s, 2.67 tokens per step, \N{GREEK SMALL LETTER GAMMA} 4.0, 3 running, 2 waiting, KV 25.0 %"
    )
    assert metrics.take_load_line(10) is None, "idle again"


class Watched(Metrics):
    """Tells what each look at the load found."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: asyncio.Queue[str | None] = asyncio.Queue()

    def take_load_line(self, seconds: float) -> str | None:
        line = super().take_load_line(seconds)
        self.looks.put_nowait(line)
        return line


def test_only_load_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        metrics = Watched()
        task = asyncio.create_task(metrics.log_load(0.001))
        try:
            async with asyncio.timeout(10):
                assert [await metrics.looks.get() for _ in range(3)] == [None] * 3
                assert caplog.messages == []
                metrics.observe_step(STATS)
                while (line := await metrics.looks.get()) is None:
                    pass
                assert await metrics.looks.get() is None
        finally:
            task.cancel()
        assert "tokens/s" in line
        assert caplog.messages == [line]

    with caplog.at_level(logging.INFO, "skippy"):
        asyncio.run(test())
