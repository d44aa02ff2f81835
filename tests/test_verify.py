"""`skippy verify` against servers that are honest and servers that are not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from skippy.engine import ConfigError, read_prompts
from skippy.server.verify import (
    VARIANTS,
    Answer,
    VerifyError,
    VerifyOptions,
    base_url,
    compare,
    difference,
    make_cases,
    run_verify,
)

Body = dict[str, Any]


def honest(request: Body) -> Body:
    """Text that depends on prompt and seed only, a few tokens drafted unless told not to."""
    tokens = [f"{request['seed']}", " and", f" {request['prompt'][:5]}"]
    drafted = 0 if request["skippy"].get("drafter") == "none" else 2
    return {
        "choices": [
            {
                "text": "".join(tokens),
                "finish_reason": "length",
                "logprobs": {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)},
            }
        ],
        "usage": {"completion_tokens": len(tokens), "skippy": {"drafted": drafted, "accepted": drafted // 2}},
    }


class FakeServer:
    """Answers by a function, and counts how many requests it had at a time."""

    def __init__(self, answer: Callable[[Body], Body] = honest) -> None:
        self.answer = answer
        self.requests: list[Body] = []
        self.inside = 0
        self.most_inside = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        self.requests.append(body)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        await asyncio.sleep(0)  # lets the others in
        self.inside -= 1
        return httpx.Response(200, json=self.answer(body))


def verify(server: Callable[[httpx.Request], Any], **options: Any) -> int:
    async def run() -> int:
        async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as client:
            return await compare(client, VerifyOptions(**options))

    return asyncio.run(run())


def test_an_honest_server(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer()
    assert verify(server, count=40, concurrency=4) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 40 differ"
    assert len(server.requests) == 40 + 10
    assert 1 < server.most_inside <= 4
    drafts = [json.dumps(request["skippy"]) for request in server.requests]
    assert set(drafts) == {"{}", '{"drafter": "none"}', '{"num_speculative_tokens": 1}'}
    assert {request["temperature"] == 0 for request in server.requests} == {True, False}
    assert all(request["model"] == "m" for request in server.requests)


def test_every_comparison_repeats_a_reference_but_for_its_drafting() -> None:
    server = FakeServer()
    verify(server, count=20)
    for request in server.requests:
        request["skippy"] = None
    references, others = server.requests[:5], server.requests[5:]
    assert all(request in references for request in others)
    assert len({request["seed"] for request in references}) == 5


def test_a_token_that_changes_with_drafting_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Body) -> Body:
        body = honest(request)
        if request["seed"] == 1 and request["skippy"] == {}:
            body["choices"][0]["logprobs"] = {"tokens": ["1", " but", " a"], "token_logprobs": [-0.5, -0.75, -1.0]}
        return body

    assert verify(FakeServer(answer), count=8) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "2 of 8 differ"
    assert "token 1: ' and' (logprob -0.5000), then ' but' (logprob -0.7500)" in out
    assert out.count("case 1, prompt ") == 2


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"text": "b"}, "text: 'a', then 'b'"),
        ({"finish_reason": "stop"}, "finish_reason: 'length', then 'stop'"),
        ({"tokens": ("a", "b"), "logprobs": (0.0, 0.0), "completion_tokens": 2}, "completion_tokens: 1, then 2"),
        ({"tokens": ("b",), "logprobs": (-1.0,)}, "token 0: 'a' (logprob 0.0000), then 'b' (logprob -1.0000)"),
        ({"logprobs": (-1.0,)}, None),
        ({"drafted": 9, "accepted": 9}, None),
    ],
)
def test_what_counts_as_a_difference(change: dict[str, Any], found: str | None) -> None:
    answer: dict[str, Any] = {"text": "a", "tokens": ("a",), "logprobs": (0.0,), "finish_reason": "length"}
    answer |= {"completion_tokens": 1, "drafted": 0, "accepted": 0}
    assert difference(Answer(**answer), Answer(**(answer | change))) == found


def never_drafts(request: Body) -> Body:
    return honest({**request, "skippy": {"drafter": "none"}})


def always_drafts(request: Body) -> Body:
    return honest({**request, "skippy": {}})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (never_drafts, "drafted no token, so nothing was verified"),
        (always_drafts, "drafted although"),
        (lambda _: {"choices": []}, "no Skippy server"),
    ],
)
def test_nothing_is_concluded_from_a_server_that_proves_nothing(answer: Callable[[Body], Body], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(FakeServer(answer), count=4)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(400, json={"error": {"message": "too long"}}), "status 400: too long"),
        (httpx.Response(500, json=["?"]), r'status 500: \["\?"\]'),
        (httpx.Response(502, text="<html>"), "not JSON"),
        (httpx.Response(200, json={"data": []}), "no model"),
    ],
)
def test_refusals_are_passed_on(response: httpx.Response, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(lambda _: response)


def test_a_refusal_in_the_crowd_ends_it() -> None:
    server = FakeServer()

    async def refuse_at_last(request: httpx.Request) -> httpx.Response:
        if len(server.requests) == 12:
            return httpx.Response(429, json={"error": {"message": "too many"}})
        return await server(request)

    with pytest.raises(VerifyError, match="status 429: too many"):
        verify(refuse_at_last, count=40)


@pytest.mark.parametrize(("url", "message"), [("http://127.0.0.1:1", "cannot reach"), ("http://[::1", "not a URL")])
def test_nobody_there(url: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        run_verify(url, VerifyOptions(count=4), timeout=5)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1"])
def test_base_urls(url: str) -> None:
    assert base_url(url) == "http://h:1"


def test_cases_meet_every_prompt_with_every_recipe() -> None:
    prompts = ["a", "b", "c"]
    cases = make_cases("m", VerifyOptions(count=len(VARIANTS) * 18), prompts)
    ignored = {"seed", "model", "max_tokens", "logprobs"}
    kinds = {json.dumps({k: v for k, v in case.request.items() if k not in ignored}) for case in cases}
    assert len(cases) == len(kinds) == 18


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028"}\r\n\n{"turns": ["b", "c"], "id": 3}\n[]\n')
    assert read_prompts(str(path), 2) == ["a\u2028", "b"]
    with pytest.raises(ConfigError, match="line 4"):
        read_prompts(str(path), 3)
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_prompts(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{', "line 2"),
        ('{"question": "a"}', "line 1"),
        ('{"prompt": 3}', r"prompts\.jsonl, line 1: Expected .*prompt"),
        ('{"prompt": ""}', "line 1"),
        ('{"prompt": "\\ud800"}', "line 1"),
        ('{"turns": []}', "line 1"),
        ('{"turns": "a"}', "line 1"),
        ('{"turns": [{"role": "user"}]}', "line 1"),
        ("[]", "line 1"),
        ("\n", "no prompts"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(str(path))
    assert "\n" not in str(caught.value)
