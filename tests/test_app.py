"""The server as a whole: loading, living with a dead engine, stopping; on the real engine too."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import psutil
import pytest

from skippy.server.app import run_server
from skippy.server.settings import Settings

if TYPE_CHECKING:
    from conftest import LiveServer, ServerFactory

STUB = str(Path(__file__).with_name("stub_worker.py"))
SERVE = """
import sys
from skippy.server.app import run_server
from skippy.server.settings import Settings
sys.exit(run_server(Settings(port=int(sys.argv[1])), (sys.executable, *sys.argv[2:])))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(*worker: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`run_server` as a process with that engine: the process and its URL."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port), *worker], stderr=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    """Returns once its log says that the model is loaded."""
    assert process.stderr is not None
    log: list[str] = []
    for line in process.stderr:
        log.append(line)
        if "Serving on" in line:
            return
    raise AssertionError("".join(log))


def health(url: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as http:
        return http.get(f"{url}/health", timeout=30)


def test_loading_is_told_and_nothing_is_served(server_with: ServerFactory) -> None:
    with server_with("--load-seconds", "30") as server:
        while (answer := health(server.url)).json().get("progress") is None:
            assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert answer.json() == {"status": "loading", "reason": "The model is still loading.", "progress": 0.25}
        for path in ("/v1/models", "/v1/models/builtin"):
            answer = httpx.get(server.url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert httpx.get(f"{server.url}/version").status_code == 200


def test_models(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as sdk:
        models = list(sdk.models.list())
        assert [model.id for model in models] == ["builtin"]
        assert models[0].model_extra is not None
        assert models[0].model_extra["max_model_len"] == 256
        assert sdk.models.retrieve("builtin").owned_by == "skippy"
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("other")


def test_the_schema_describes_the_body_and_every_reference_in_it_leads_somewhere(server: LiveServer) -> None:
    text = httpx.get(f"{server.url}/openapi.json").text
    schema = json.loads(text)
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "continuous_usage_stats" in json.dumps(body["properties"]["stream_options"])
    assert "num_speculative_tokens" in json.dumps(body["properties"]["skippy"])
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', text):
        node = schema
        for name in reference.split("/"):
            node = node[name]


def test_a_served_model_name_replaces_the_folder(server_with: ServerFactory) -> None:
    with server_with(served_model_name="org/coder") as server:
        server.wait_until_loaded()
        assert httpx.get(f"{server.url}/v1/models/org/coder").json()["id"] == "org/coder"
        body = {"prompt": "a", "model": "org/coder"}
        assert httpx.post(f"{server.url}/v1/completions", json=body).json()["model"] == "org/coder"


def test_clients_of_a_dying_engine_hear_of_it_and_so_do_later_ones(server_with: ServerFactory) -> None:
    with server_with("--step-seconds", "0.01") as server:
        server.wait_until_loaded()
        streams: list[str] = []
        statuses: list[int] = []

        def stream() -> None:
            body = {"prompt": [5], "max_tokens": 250, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                started.release()
                streams.append("\n".join([first, *lines]))

        def post() -> None:
            body = {"prompt": [5], "max_tokens": 250}
            statuses.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code)

        started = threading.Semaphore(0)
        threads = [threading.Thread(target=target) for target in (stream, stream, post)]
        for thread in threads:
            thread.start()
        assert started.acquire(timeout=10)
        assert started.acquire(timeout=10)
        os.kill(server.engine_pid, signal.SIGKILL)
        for thread in threads:
            thread.join(10)
        assert statuses == [503]
        assert len(streams) == 2
        for text in streams:
            assert '"code":"engine_dead"' in text
            assert "[DONE]" not in text
        answer = health(server.url)
        assert (answer.status_code, answer.json()["status"]) == (503, "dead")
        assert "SIGKILL" in answer.json()["reason"]
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        metrics = httpx.get(f"{server.url}/metrics").text
        assert "skippy_requests_total" in metrics
        assert "skippy_requests_running 0.0" in metrics


@pytest.mark.parametrize(
    ("worker", "reason"),
    [((STUB, "--fatal", "no such model"), "no such model"), ((STUB, "--model-path", "/nowhere"), "no tokenizer.json")],
)
def test_a_failed_load_ends_the_server_with_one_line(worker: tuple[str, ...], reason: str) -> None:
    with serving(*worker) as (process, _):
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert [line for line in errors.splitlines() if reason in line] == errors.splitlines()[-1:]
        assert errors.splitlines()[-1].startswith("skippy: error: ")


def test_an_address_in_use_ends_the_server_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run_server(Settings(port=taken.getsockname()[1])) == 2
    assert "cannot listen on 127.0.0.1:" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_leaves_no_process(number: signal.Signals) -> None:
    with serving(STUB, "--step-seconds", "0.02") as (process, url):
        wait_until_serving(process)
        engine = psutil.Process(process.pid).children()[0]
        body = {"prompt": [5], "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            process.send_signal(number)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(20) == 0
        assert not engine.is_running()


def test_a_signal_while_loading_stops_at_once() -> None:
    with serving(STUB, "--load-seconds", "60") as (process, url):
        assert health(url).status_code == 503
        process.terminate()
        assert process.wait(20) == 0


# --- the real engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The built-in model, served as `skippy serve` does."""
    with serving("-m", "skippy.engine.worker") as (process, url):
        wait_until_serving(process)
        assert health(url).status_code == 200
        yield process, url


def test_the_builtin_model_answers_the_sdk(real: tuple[subprocess.Popen[str], str]) -> None:
    prompt = "def fibonacci(n):\n"
    with openai.OpenAI(base_url=f"{real[1]}/v1", api_key="none") as sdk:

        def text(width: int) -> tuple[str, int]:
            answer = sdk.completions.create(
                model="builtin",
                prompt=prompt,
                max_tokens=48,
                temperature=0,
                stop=["\n\n"],
                extra_body={"skippy": {"num_speculative_tokens": width}},
            )
            assert answer.usage is not None
            return answer.choices[0].text, answer.usage.completion_tokens

        drafted = text(4)
        assert drafted == text(0)
        assert drafted[0].startswith("    ")
        stream = sdk.completions.create(
            model="builtin", prompt=prompt, max_tokens=48, temperature=0, stop=["\n\n"], stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == drafted[0]


def test_the_server_process_stays_small(real: tuple[subprocess.Popen[str], str]) -> None:
    assert psutil.Process(real[0].pid).memory_info().rss < 150e6


def test_clients_that_leave_free_the_real_engine(real: tuple[subprocess.Popen[str], str]) -> None:
    body = {"prompt": "def f(", "n": 3, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=real[1], timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert next(answer.iter_lines())
        deadline = time.monotonic() + 30
        while "skippy_requests_running 0.0" not in (metrics := http.get("/metrics").text.splitlines()):
            assert time.monotonic() < deadline, "the sequences still run"
            time.sleep(0.01)
        assert "skippy_kv_cache_usage_ratio 0.0" in metrics
        assert 'skippy_requests_total{finish_reason="abort"} 3.0' in metrics


def test_killing_the_real_engine_reaches_its_clients(real: tuple[subprocess.Popen[str], str]) -> None:
    process, url = real
    engine = psutil.Process(process.pid).children()[0]
    body = {"prompt": "def f(", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        engine.kill()
        assert '"code":"engine_dead"' in list(lines)[-2]
    assert health(url).json()["status"] == "dead"
