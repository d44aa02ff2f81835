"""What requests may ask for: every refusal names the parameter at fault."""

from __future__ import annotations

import math
from typing import Any

import pytest

from skippy.engine.config import EngineConfig
from skippy.engine.errors import ConfigError, InvalidRequest, SkippyError
from skippy.engine.types import MAX_CHOICES, MAX_LOGPROBS, Request, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", [-1]),
        ("temperature", [-0.1, 100.1, NAN, INF]),
        ("top_p", [0.0, -0.5, 1.01, NAN]),
        ("top_k", [-1]),
        ("min_p", [-0.01, 1.01, NAN]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN, INF]),
        ("repetition_penalty", [0.0, -1.0, 101.0, NAN]),
        ("logit_bias", [{1: 100.5}, {1: -101.0}, {-1: 0.0}, {2: NAN}]),
        ("min_tokens", [-1, 17]),
        ("stop_token_ids", [(-1,), (3, -2)]),
        ("seed", [2**63, -(2**63) - 1]),
        ("logprobs", [-1, MAX_LOGPROBS + 1]),
        ("prompt_logprobs", [-1, MAX_LOGPROBS + 1]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(**{param: value})
        assert caught.value.param == param
        assert caught.value.message.startswith(f"{param} must be ")
        assert str(value) in caught.value.message, "it says what was given"


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", [0, 10**6]),
        ("temperature", [0, 0.0, 1e-6, 100.0]),
        ("top_p", [1e-9, 1.0, 1]),
        ("top_k", [0, 1, 10**6]),
        ("min_p", [0.0, 1.0]),
        ("presence_penalty", [-2.0, 2.0]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("repetition_penalty", [0.01, 100.0]),
        ("logit_bias", [{}, {0: -100.0, 5: 100.0}]),
        ("min_tokens", [0, 16]),
        ("stop_token_ids", [(), (0, 1)]),
        ("seed", [None, 0, -(2**63), 2**63 - 1]),
        ("logprobs", [None, 0, MAX_LOGPROBS]),
        ("prompt_logprobs", [None, 0, MAX_LOGPROBS]),
    ],
)
def test_the_ends_of_every_range_are_in_it(param: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{param: value}), param) == value


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy_is_a_temperature_of_nearly_nothing(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


class TestRequest:
    def test_a_prompt_has_at_least_one_token(self) -> None:
        with pytest.raises(InvalidRequest, match="prompt is empty") as caught:
            Request("r", ())
        assert caught.value.param == "prompt"

    @pytest.mark.parametrize("n", [0, -1, MAX_CHOICES + 1])
    def test_the_number_of_choices_is_limited(self, n: int) -> None:
        with pytest.raises(InvalidRequest, match=str(MAX_CHOICES)) as caught:
            Request("r", (1,), n=n)
        assert caught.value.param == "n"

    def test_no_fewer_than_no_tokens_are_drafted(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            Request("r", (1,), num_speculative_tokens=-1)
        assert caught.value.param == "skippy.num_speculative_tokens"
        assert Request("r", (1,), num_speculative_tokens=0, n=MAX_CHOICES).n == MAX_CHOICES


class TestEngineConfig:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_num_seqs", 0),
            ("max_num_batched_tokens", 0),
            ("block_size", 0),
            ("max_model_len", 0),
            ("kv_cache_memory_bytes", 0),
            ("num_threads", -1),
            ("num_speculative_tokens", -1),
            ("gpu_memory_utilization", 0.0),
            ("gpu_memory_utilization", 1.1),
        ],
    )
    def test_what_is_out_of_range_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name} .*{value}"):
            EngineConfig(**{name: value})

    def test_every_running_sequence_has_a_row(self) -> None:
        with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\).*max_num_seqs \(9\)"):
            EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)
        assert EngineConfig(max_num_batched_tokens=9, max_num_seqs=9).max_num_seqs == 9


def test_whatever_is_raised_on_purpose_has_one_root() -> None:
    assert issubclass(InvalidRequest, SkippyError)
    assert issubclass(ConfigError, SkippyError)
    assert InvalidRequest("no field is at fault").param is None
