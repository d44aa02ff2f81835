"""/v1/completions over a real connection; the scripted engine repeats the prompt's tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from skippy.engine import Tokenizer

if TYPE_CHECKING:
    from conftest import LiveServer, ServerFactory

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "engine" / "builtin")
PROMPT = "def f(x):\n    return 'é日😀'\n"
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Every chunk; the stream has to end with [DONE]."""
    answer = http.post("/v1/completions", json={"prompt": PROMPT, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(data.removeprefix("data: ")) for data in events[:-2]]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def refusal(http: httpx.Client, status: int, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- what a completion says -----------------------------------------------------------------------------------------


def test_the_sdk_reads_an_answer(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="builtin", prompt=PROMPT, max_tokens=40, logprobs=2, user="someone")
    ids = TOKENIZER.encode(PROMPT)
    assert answer.object == "text_completion"
    assert answer.model == "builtin"
    choice = answer.choices[0]
    assert choice.text == TOKENIZER.decode((ids * 9)[:40])
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 40
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == len(ids) + 40
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(ids) // 16 * 16
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["skippy"]["drafter"] == "ngram"


def test_the_sdk_reads_a_stream(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.completions.create(
            model="builtin", prompt=PROMPT, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TOKENIZER.decode(TOKENIZER.encode(PROMPT)[:9])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


def test_sixteen_tokens_unless_told_otherwise_and_no_more_than_fit(http: httpx.Client) -> None:
    assert complete(http)["usage"]["completion_tokens"] == 16
    assert complete(http, max_tokens=None)["usage"]["completion_tokens"] == 16
    assert complete(http, prompt=[5] * 250)["usage"]["completion_tokens"] == 6  # of a context of 256


@pytest.mark.parametrize("width", [0, 1, 5])
def test_a_stream_says_what_the_whole_answer_says(http: httpx.Client, width: int) -> None:
    body = {"max_tokens": 50, "n": 2, "skippy": {"num_speculative_tokens": width}}
    whole, chunks = complete(http, **body), stream(http, **body)
    for index in (0, 1):
        assert streamed_text(chunks, index) == whole["choices"][index]["text"]
    texts = [chunk["choices"][0] for chunk in chunks]
    assert all(choice["text"] for choice in texts if choice["finish_reason"] is None)
    assert len(texts) <= 2 * -(-50 // (width + 1))
    assert "usage" not in chunks[0]


def test_usage_in_a_stream(http: httpx.Client) -> None:
    chunks = stream(http, max_tokens=3, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    chunks = stream(http, max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]], ["a b", "c"]])
def test_every_form_of_prompt(http: httpx.Client, prompt: list[Any]) -> None:
    prompts = [prompt] if isinstance(prompt[0], int) else prompt
    answer = complete(http, prompt=prompt, max_tokens=4, n=2)
    ids = [TOKENIZER.encode(p) if isinstance(p, str) else p for p in prompts]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    expected = [TOKENIZER.decode((i * 4)[:4]) for i in ids for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_an_end_of_text_token_ends_without_showing(http: httpx.Client) -> None:
    choice = complete(http, prompt=f"a b{EOS}")["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a b", "stop", None)
    for options, text in (
        ({"skip_special_tokens": False}, "a b"),
        ({"include_stop_str_in_output": True}, "a b"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, f"a b{EOS}"),
    ):
        assert complete(http, prompt=f"a b{EOS}", **options)["choices"][0]["text"] == text
    ignored = complete(http, prompt=f"a b{EOS}", ignore_eos=True, max_tokens=8)["choices"][0]
    assert (ignored["text"], ignored["finish_reason"]) == ("a ba ba b", "length")


def test_a_stop_token_ends_and_is_named(http: httpx.Client) -> None:
    for included, text in ((False, [70]), (True, [70, 71])):
        body = {"stop_token_ids": [71], "include_stop_str_in_output": included}
        answer = complete(http, prompt=[70, 71, 72], logprobs=0, **body)
        choice = answer["choices"][0]
        assert choice["text"] == TOKENIZER.decode(text)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 71)
        assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("width", range(7))
@pytest.mark.parametrize("stop", ["\n", "):", "日", "n 'é", ["zzz", "return 'é日😀"]])
def test_a_stop_string_cuts_at_the_same_token_however_many_come_at_once(
    http: httpx.Client, stop: str | list[str], width: int
) -> None:
    body = {"stop": stop, "max_tokens": 60, "skippy": {"num_speculative_tokens": width}}
    answer = complete(http, **body)
    matched = stop if isinstance(stop, str) else stop[1]
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT[: PROMPT.index(matched)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", matched)
    ids = TOKENIZER.encode(PROMPT)
    needed = next(i for i in range(len(ids)) if matched in TOKENIZER.decode(ids[:i]))
    assert answer["usage"]["completion_tokens"] == needed
    assert streamed_text(stream(http, **body)) == choice["text"]
    included = complete(http, **body, include_stop_str_in_output=True)["choices"][0]
    assert included["text"] == choice["text"] + matched


def test_stop_strings_wait_for_min_tokens(http: httpx.Client) -> None:
    answer = complete(http, prompt="a\nb\n", stop="\n", min_tokens=3, max_tokens=20)
    assert answer["usage"]["completion_tokens"] >= 4
    assert answer["choices"][0]["text"] == "a\nb"


def test_echo_and_a_completion_of_nothing(http: httpx.Client) -> None:
    whole = complete(http, echo=True, max_tokens=5)["choices"][0]["text"]
    assert whole == PROMPT + TOKENIZER.decode(TOKENIZER.encode(PROMPT)[:5])
    assert streamed_text(stream(http, echo=True, max_tokens=5)) == whole
    answer = complete(http, echo=True, max_tokens=0, logprobs=1)
    assert answer["choices"][0]["text"] == PROMPT
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    partial = TOKENIZER.encode("日")[:1]
    assert complete(http, prompt=partial, echo=True, max_tokens=0)["choices"][0]["text"] == "\ufffd"


@pytest.mark.parametrize("width", [0, 3])
def test_logprobs(http: httpx.Client, width: int) -> None:
    ids = TOKENIZER.encode(PROMPT)
    body = {"logprobs": 2, "echo": True, "max_tokens": len(ids), "skippy": {"num_speculative_tokens": width}}
    choice = complete(http, **body)["choices"][0]
    logprobs = choice["logprobs"]
    assert len({len(column) for column in logprobs.values()}) == 1
    assert len(logprobs["tokens"]) == 2 * len(ids)
    assert logprobs["token_logprobs"][:2] == [None, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert top[token] == -0.5
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"]), "the prompt has rare characters"
    columns: dict[str, list[Any]] = {name: [] for name in logprobs}
    for chunk in stream(http, **body):
        for name in columns:
            columns[name] += chunk["choices"][0]["logprobs"][name]
    assert columns == logprobs


def test_drafting_is_reported(http: httpx.Client) -> None:
    body = {"max_tokens": 12, "skippy": {"drafter": "none", "num_speculative_tokens": 3}}
    usage = complete(http, n=2, **body)["usage"]["skippy"]
    assert usage == {"drafter": "none", "drafted": 18, "accepted": 18, "steps": 6, "tokens_per_step": 4.0}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("n", 0),
        ("n", 1000),
        ("best_of", 2),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("logit_bias", {"9999": 1}),
        ("logit_bias", {"5": 101}),
        ("stop_token_ids", [8192]),
        ("min_tokens", 17),
        ("seed", 2**70),
        ("stop", ["a"] * 17),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [8192]),
        ("prompt", [-1]),
        ("prompt", 5),
        ("suffix", "x"),
        ("tools", []),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_bad_value_is_named(http: httpx.Client, field: str, value: Any) -> None:
    error = refusal(http, 400, **{field: value})
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert field in error["message"] or "prompt" in error["message"]


def test_an_unknown_model_is_not_found(http: httpx.Client, sdk: openai.OpenAI) -> None:
    error = refusal(http, 404, model="gpt-4")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        sdk.completions.create(model="gpt-4", prompt="a")


def test_what_does_not_fit_the_context(http: httpx.Client) -> None:
    for body in ({"max_tokens": 256}, {"prompt": [5] * 256}, {"prompt": [5] * 200, "max_tokens": 57}):
        error = refusal(http, 400, **body)
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]
    assert complete(http, prompt=[5] * 200, max_tokens=56)["usage"]["total_tokens"] == 256


def test_unknown_drafters_are_answered_with_the_known_ones(http: httpx.Client) -> None:
    error = refusal(http, 400, skippy={"drafter": "oracle"})
    assert error["param"] == "skippy.drafter"
    assert "none, ngram" in error["message"]
    error = refusal(http, 400, skippy={"num_speculative_tokens": 9})
    assert error["param"] == "skippy.num_speculative_tokens"
    assert "8" in error["message"]
    assert refusal(http, 400, skippy={"draft": 1})["param"] == "skippy.draft"


def test_a_refusal_before_a_stream_is_an_ordinary_answer(http: httpx.Client) -> None:
    assert refusal(http, 400, stream=True, n=128, prompt=["a"] * 100)["param"] == "n"


def test_a_full_queue(server_with: ServerFactory) -> None:
    with server_with("--step-seconds", "0.01", max_waiting=1) as server:
        server.wait_until_loaded()
        with (
            httpx.Client(base_url=server.url, timeout=30) as http,
            http.stream(
                "POST", "/v1/completions", json={"prompt": [5], "n": 5, "max_tokens": 250, "stream": True}
            ) as a,
        ):
            lines = a.iter_lines()  # kept: without it httpx would close the connection
            assert next(lines)
            answer = http.post("/v1/completions", json={"prompt": [5]})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
            assert refusal(http, 400, n=6)["param"] == "n"
            assert http.get("/health").status_code == 200


# --- clients that leave, engines that fail --------------------------------------------------------------------------


def wait_for_metric(http: httpx.Client, line: str) -> None:
    deadline = time.monotonic() + 10
    while line not in http.get("/metrics").text.splitlines():
        assert time.monotonic() < deadline, f"never saw {line}"
        time.sleep(0.01)


def tokens_generated(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("skippy_generation_tokens_total "))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_a_step(server_with: ServerFactory, streamed: bool) -> None:
    # Steps that last long beside everything else: what is told late costs many of them.
    with server_with("--step-seconds", "0.5") as server:
        server.wait_until_loaded()
        with httpx.Client(base_url=server.url, timeout=30) as http:
            body = {"prompt": [5], "n": 2, "max_tokens": 250, "stream": streamed}
            with httpx.Client(base_url=server.url, timeout=httpx.Timeout(30, read=0.9)) as leaver:
                if streamed:
                    with leaver.stream("POST", "/v1/completions", json=body) as answer:
                        lines = answer.iter_lines()  # kept: without it httpx would close the connection
                        assert next(lines).startswith("data: ")
                        wait_for_metric(http, "skippy_requests_running 2.0")
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        leaver.post("/v1/completions", json=body)
            when_left = tokens_generated(http)
            wait_for_metric(http, "skippy_requests_running 0.0")
            assert when_left >= 2, "it left before the first step"
            assert tokens_generated(http) - when_left <= 2, "one token for each of its two choices"
            wait_for_metric(http, 'skippy_requests_total{finish_reason="abort"} 2.0')
            wait_for_metric(http, "skippy_kv_cache_usage_ratio 0.0")


def test_a_request_that_fails_in_the_engine(server_with: ServerFactory) -> None:
    with server_with("--fail-at-step", "3") as server:
        server.wait_until_loaded()
        with httpx.Client(base_url=server.url, timeout=30) as http:
            answer = http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 9, "stream": True})
            events = answer.text.split("\n\n")
            assert len(events) == 4  # two chunks, the error, and nothing after it
            assert json.loads(events[2].removeprefix("data: "))["error"]["code"] == "engine_error"
            assert complete(http)["usage"]["completion_tokens"] == 16
            wait_for_metric(http, 'skippy_requests_total{finish_reason="error"} 1.0')


def test_a_failure_before_the_first_token_has_its_status(server_with: ServerFactory) -> None:
    with server_with("--fail-at-step", "1") as server:
        server.wait_until_loaded()
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [5], "stream": True})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "stub"
