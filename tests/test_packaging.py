"""The wheel holds all of Skippy and nothing else, and serves from wherever it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from skippy.server.metrics import Metrics

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PACKAGE_DIR: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
README = (REPOSITORY / "README.md").read_text()
START_SECONDS = 60


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing stale gets in and no build folder is left behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for folder in PACKAGE_DIR.values():
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = target.iterdir()
    return built


@pytest.fixture(scope="session")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel, without its dependencies, is installed into."""
    target = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def environment_of(elsewhere: Path) -> dict[str, str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("SKIPPY_")}
    return {**settings, "PYTHONPATH": str(elsewhere)}


class TestWheel:
    def test_it_holds_only_skippy(self, wheel: Path) -> None:
        tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert tops == {"skippy", f"skippy_serve-{version('skippy-serve')}.dist-info"}

    def test_it_holds_every_file_of_the_packages(self, wheel: Path) -> None:
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("skippy/")}
        expected = {
            f"{package.replace('.', '/')}/{path.relative_to(REPOSITORY / folder)}"
            for package, folder in PACKAGE_DIR.items()
            for path in (REPOSITORY / folder).rglob("*")
            if path.is_file()
            and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(REPOSITORY).parts)
        }
        assert packed == expected
        assert {"skippy/engine/py.typed", "skippy/server/py.typed"} < packed
        for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
            assert f"skippy/engine/builtin/{name}" in packed

    def test_its_metadata(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        [path] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Parser().parsestr(archive.read(path).decode())
        assert metadata["Name"] == "skippy-serve"
        assert metadata["License-Expression"] == "Apache-2.0"
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())

    def test_it_is_imported_from_where_it_is_installed(self, elsewhere: Path, tmp_path: Path) -> None:
        script = (
            "import sys, skippy.engine, skippy.server.cli, skippy.engine.messages\n"
            "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('skippy.')), sep='\\n')"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment_of(elsewhere), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        files = done.stdout.split()
        assert len(files) > 5
        assert [file for file in files if not file.startswith(f"{elsewhere}/skippy/")] == []


def test_the_package_list_equals_the_folders() -> None:
    folders = {
        ".".join([package, *path.parent.relative_to(REPOSITORY / folder).parts])
        for package, folder in PACKAGE_DIR.items()
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("name", ["engine", "server"])
def test_the_folders_cannot_be_imported_by_their_own_names(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import this package as 'skippy.{name}'" in done.stderr


class TestVersions:
    def test_the_version_stands_in_one_place_and_in_the_changelog(self) -> None:
        assert PYPROJECT["project"]["version"] == version("skippy-serve")
        assert f"## [{version('skippy-serve')}]" in (REPOSITORY / "CHANGELOG.md").read_text()
        for folder in PACKAGE_DIR.values():
            for path in (REPOSITORY / folder).rglob("*.py"):
                assert "__version__" not in path.read_text(), path

    def test_constraints_pin_every_dependency_within_its_range(self) -> None:
        pins: dict[str, str] = {}
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
            if not line.startswith("#"):
                name, _, pin = line.partition("==")
                pins[canonicalize_name(name)] = pin
        project = PYPROJECT["project"]
        for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
            requirement = Requirement(text)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
        # An index with CPU builds and one with CUDA builds must both be able to satisfy the pins.
        assert "+" not in pins["torch"]
        assert [name for name in pins if name.startswith(("nvidia", "triton"))] == []


class TestReadme:
    def test_the_two_commands(self) -> None:
        commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
        setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
        assert commands == [f"{setup}. && skippy serve", f"{setup}'.[dev]' && pytest"]

    def test_its_snippets_can_be_parsed(self) -> None:
        blocks: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
        assert {"sh", "python", "json"} <= {language for language, _ in blocks}
        for language, text in blocks:
            match language:
                case "python":
                    compile(text, "README.md", "exec")
                case "json":
                    assert "skippy" in json.loads(text)
                case _:
                    assert subprocess.run(["sh", "-n", "-c", text], check=False).returncode == 0, text

    def test_its_metrics_exist(self) -> None:
        exported = Metrics().render().decode()
        names = re.findall(r"`(skippy_\w+)", README)
        assert len(names) > 10
        assert [name for name in names if name not in exported] == []

    def test_its_links_lead_somewhere(self) -> None:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
            assert (REPOSITORY / target).exists(), target


@pytest.fixture(scope="module")
def server(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of `skippy serve` run from the installed wheel, in a folder of its own."""
    folder = tmp_path_factory.mktemp("cwd")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "skippy.server.cli", "serve", "--port", str(port), "--dtype", "float32"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment_of(elsewhere), stdout=log, stderr=log)
        try:
            wait_until_ready(url, process, folder / "log")
            yield url
        finally:
            process.terminate()
            code = process.wait(timeout=30)
    assert code == 0, (folder / "log").read_text()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    pytest.fail(f"not ready after {START_SECONDS} s: {log.read_text()}")


class TestServing:
    def test_a_completion(self, server: str) -> None:
        request = {"prompt": "def fibonacci(n):\n", "max_tokens": 8, "temperature": 0}
        response = httpx.post(f"{server}/v1/completions", json=request, timeout=60)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 8

    def test_smoke(self, server: str) -> None:
        done = subprocess.run([REPOSITORY / "deploy/smoke.sh", server], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith(f"smoke: all good at {server}\n")

    def test_verify(self, server: str) -> None:
        command = [sys.executable, "-m", "skippy.server.cli", "verify", server, "--count", "48", "--max-tokens", "32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "0 of 48 differ"
