"""Failures in OpenAI's shape, over a real connection where the framework makes them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import httpx
import pytest

from skippy.engine import EngineDead, InvalidRequest
from skippy.server.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from conftest import LiveServer


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidRequest("no", "n"), 400, "invalid_request_error", "n", None),
        (EngineDead("gone"), 503, "service_unavailable_error", None, "engine_dead"),
        (ApiError(404, "what", code="x"), 404, "invalid_request_error", None, "x"),
        (ApiError(429, "later"), 429, "rate_limit_error", None, None),
        (ApiError(500, "oh"), 500, "server_error", None, None),
    ],
)
def test_each_failure_has_its_status_and_type(
    error: Exception, status: int, kind: str, param: str | None, code: str | None
) -> None:
    answer = as_api_error(error)
    assert (answer.status, answer.body.type, answer.body.param, answer.body.code) == (status, kind, param, code)


def test_an_unexpected_failure_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = as_api_error(ZeroDivisionError("secret"))
    assert answer.status == 500
    assert b"secret" not in answer.encode()
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/v1/chat", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_wrong_paths_and_methods(server: LiveServer, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path in error["message"]
    if status == 405:
        assert answer.headers["allow"]


def test_who_wants_to_chat_is_told_where_to_go(server: LiveServer) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 404
    assert "no chat template: send the text itself to /v1/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_bad_json_is_refused_and_good_json_taken_whatever_it_is_called(server: LiveServer, content_type: str) -> None:
    url, headers = f"{server.url}/v1/completions", {"content-type": content_type}
    answer = httpx.post(url, content=b'{"prompt": "a"', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert httpx.post(url, content=b'{"prompt": "a"}', headers=headers).status_code == 200
