"""The image and Compose files, held against the code and each other. No Docker is needed."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from skippy.server import cli
from skippy.server.settings import Settings, load

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


class Instruction(NamedTuple):
    stage: int
    keyword: str
    rest: str


def dockerfile() -> list[Instruction]:
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    instructions, stage = [], -1
    for line in filter(None, joined.splitlines()):
        keyword, _, rest = line.partition(" ")
        stage += keyword == "FROM"
        instructions.append(Instruction(stage, keyword, rest.strip()))
    return instructions


DOCKERFILE = dockerfile()
FINAL = [instruction for instruction in DOCKERFILE if instruction.stage == DOCKERFILE[-1].stage]


def only(keyword: str) -> str:
    """The argument of an instruction that the final image has once."""
    [found] = [instruction.rest for instruction in FINAL if instruction.keyword == keyword]
    return found


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(only("ENV")))


def compose() -> dict[str, Any]:
    document = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    assert isinstance(document, dict)
    return document


def is_sent_to_builder(path: str) -> bool:
    """Whether .dockerignore lets a file through; the last matching line decides."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!").removeprefix("**/")
        names = [path, *(str(parent) for parent in Path(path).parents), *Path(path).parts]
        if pattern and not pattern.startswith("#") and any(fnmatch.fnmatchcase(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


class TestImage:
    def test_every_source_exists_and_is_sent(self) -> None:
        copied = [i.rest.split()[:-1] for i in DOCKERFILE if i.keyword == "COPY" and "--from" not in i.rest]
        sources = [source for group in copied for source in group]
        assert {"pyproject.toml", "constraints.txt", "engine", "server"} <= set(sources)
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert is_sent_to_builder(source), source

    def test_what_the_wheel_is_made_of_is_sent_and_nothing_else(self) -> None:
        project = PYPROJECT["project"]
        folders = PYPROJECT["tool"]["setuptools"]["package-dir"].values()
        for needed in [project["readme"], *project["license-files"], *folders, "engine/builtin/model.safetensors"]:
            assert is_sent_to_builder(needed), needed
        for other in [".git", ".env", "tests/test_cli.py", "engine/__pycache__", "server/cli.pyc", ".venv", "build"]:
            assert not is_sent_to_builder(other), other

    def test_python_is_one_that_the_package_supports(self) -> None:
        [image] = [i.rest for i in DOCKERFILE if i.keyword == "ARG" and i.rest.startswith("PYTHON_IMAGE=")]
        found = re.fullmatch(r"PYTHON_IMAGE=python:3\.(\d+)-slim", image)
        assert found is not None
        minimum = re.fullmatch(r">=3\.(\d+)", PYPROJECT["project"]["requires-python"])
        assert minimum is not None
        assert int(found[1]) >= int(minimum[1])

    def test_the_list_of_dependencies_that_it_installs(self) -> None:
        [run] = [i.rest for i in FINAL if i.keyword == "RUN" and "tomllib" in i.rest]
        words = shlex.split(run)
        script = words[words.index("-c") + 1]
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == PYPROJECT["project"]["dependencies"]

    def test_its_user_is_not_root_and_owns_the_cache(self) -> None:
        user = only("USER")
        assert not user.startswith(("0", "root"))
        [make_user] = [i.rest for i in FINAL if i.keyword == "RUN" and "useradd" in i.rest]
        assert f"--uid {user.partition(':')[0]} " in make_user
        # What the hub's library and `skippy tune` write lies in the user's cache folder.
        named = make_user.partition("install --directory --owner=skippy --group=skippy ")[2].split()
        assert named == [only("VOLUME")] == ["/home/skippy/.cache"]
        assert not image_environment().keys() & {"HF_HOME", "XDG_CACHE_HOME"}

    def test_it_starts_a_server_that_can_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in image_environment().items():
            monkeypatch.setenv(name, value)
        entry_point, command = json.loads(only("ENTRYPOINT")), json.loads(only("CMD"))
        assert entry_point == list(PYPROJECT["project"]["scripts"])
        arguments = cli.build_parser().parse_args(command)
        settings = load({}, {name: value for name, value in os.environ.items() if name.startswith("SKIPPY_")}).settings
        assert arguments.command == "serve"
        assert settings.host == "0.0.0.0"
        assert only("EXPOSE") == str(settings.port) == str(Settings().port)

    @pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
    def test_its_health_check(self, status: int, code: int) -> None:
        command = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
        assert command[0] == "python"
        with answering(status) as (port, paths):
            # A proxy for the hub is none for the container's own server.
            proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
            environment = {**os.environ, **proxy, "SKIPPY_PORT": str(port)}
            done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
        assert done.returncode == code
        assert paths == ["/health"]
        assert f"or '{Settings().port}'" in command[2]


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that always answers so; its port and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, paths
        finally:
            server.shutdown()
            thread.join()


class TestCompose:
    def test_the_gpu_service_is_the_default(self) -> None:
        services = compose()["services"]
        assert [name for name, service in services.items() if "profiles" not in service] == ["skippy"]
        [device] = services["skippy"]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]

    def test_the_cpu_service_needs_no_gpu(self) -> None:
        service = compose()["services"]["cpu"]
        assert "deploy" not in service
        declared = {i.rest.partition("=")[0] for i in FINAL if i.keyword == "ARG"}
        assert set(service["build"]["args"]) <= declared
        assert service["build"]["args"]["TORCH_INDEX"].endswith("/whl/cpu")
        settings = load({}, service["environment"]).settings
        assert (settings.model, settings.device) == ("builtin", "cpu")
        assert "SKIPPY_MODEL" not in service["environment"], "it would win over .env"

    @pytest.mark.parametrize("name", ["skippy", "cpu"])
    def test_only_this_machine_can_reach_it(self, name: str) -> None:
        service = compose()["services"][name]
        settings = load({}, service["environment"]).settings
        assert settings.host == "0.0.0.0"
        assert service["ports"] == [f"127.0.0.1:8000:{settings.port}"]
        assert str(settings.port) == only("EXPOSE")

    def test_a_mistake_does_not_restart_it_for_ever(self) -> None:
        assert {service["restart"] for service in compose()["services"].values()} == {"on-failure:3"}

    def test_the_volume_is_where_the_image_keeps_its_cache(self) -> None:
        document = compose()
        for service in document["services"].values():
            [volume] = service["volumes"]
            name, _, target = volume.partition(":")
            assert name in document["volumes"]
            assert target == only("VOLUME")


class TestScripts:
    SCRIPTS = ("deploy/smoke.sh", ".ci/run")

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_can_be_run(self, script: str) -> None:
        path = REPOSITORY / script
        assert os.access(path, os.X_OK)
        shell = path.read_text().splitlines()[0].removeprefix("#!").removeprefix("/usr/bin/env ")
        assert subprocess.run([*shell.split(), "-n", str(path)], check=False).returncode == 0

    def test_smoke_fails_loudly_where_nobody_answers(self) -> None:
        done = subprocess.run(
            [REPOSITORY / "deploy/smoke.sh", "http://127.0.0.1:1"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "smoke: FAILED: health: no answer from http://127.0.0.1:1/health" in done.stderr

    def test_smoke_tells_what_it_expected(self) -> None:
        with answering(503) as (port, _):
            done = subprocess.run(
                [REPOSITORY / "deploy/smoke.sh", f"http://127.0.0.1:{port}"],
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert "health: expected status 200 from /health, got 503" in done.stderr
