"""Names and folders; what is downloaded from a hub (one on this machine), and how it is told that it cannot be."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from skippy.engine import BUILTIN_MODEL, CheckpointError, hub

COMMIT, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_" + "t" * 30
LARGE = b"weights" * 1000
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}',
    "s3d/adapter.json": b'{"format_version": 1}',
    "s3d/adapter.safetensors": b"adapter",
    "model-00001-of-00001.safetensors": LARGE,
    "consolidated.safetensors": b"again" * 1000,
    "pytorch_model.bin": b"pickle" * 1000,
    "modeling_own.py": b"raise SystemExit('code of a model was run')",
    "README.md": b"# A model",
}
TREE = [
    {"type": "file", "path": file, "size": len(data), "oid": sha1(data).hexdigest()} for file, data in FILES.items()
]
SMALL = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "s3d/adapter.json",
    "s3d/adapter.safetensors",
}


class TestNames:
    def test_the_builtin_model(self) -> None:
        assert (hub.find_model(BUILTIN_MODEL) / "model.safetensors").is_file()

    def test_a_folder_wins_over_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert hub.find_model("owner/model") == Path("owner/model")
        assert hub.local_folder("owner/other") is None

    def test_a_folder_may_stand_in_the_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert hub.find_model("~/model") == tmp_path / "model"

    @pytest.mark.parametrize("name", ["no/such/model", "./model", "../model", "/model", "~/model", "a b", "ü/x"])
    def test_what_can_be_no_name_on_the_hub_is_a_folder_that_is_not_there(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="There is no model folder"):
            hub.local_folder(name)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        with pytest.raises(CheckpointError, match=r"model\.gguf is a file"):
            hub.local_folder(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B-Instruct", "a_b/c.d"])
    def test_names_on_the_hub(self, name: str) -> None:
        assert hub.local_folder(name) is None

    def test_a_folder_has_no_revision(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is a folder and has no revision 'v1'"):
            hub.find_model(str(tmp_path), "v1")
        with pytest.raises(CheckpointError, match="has no revision"):
            hub.find_model(BUILTIN_MODEL, "main")


class TestAdapters:
    """`find_trained`: a folder, or what the hub has by that name."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, tuple[str, ...]]]:
        calls: list[tuple[str, str | None, tuple[str, ...]]] = []

        def download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
            calls.append((name, revision, patterns))
            return tmp_path

        monkeypatch.setattr(hub, "download", download)
        return calls

    def test_its_description_is_read_first(self, tmp_path: Path, asked: list[object]) -> None:
        assert hub.find_trained("owner/adapter") == tmp_path
        assert asked == [
            ("owner/adapter", None, ("*.json",)),
            ("owner/adapter", tmp_path.name, ("*.json", "*.safetensors")),
        ]

    def test_a_whole_model_is_not_downloaded(self, tmp_path: Path, asked: list[object]) -> None:
        (tmp_path / "model.safetensors.index.json").touch()
        assert hub.find_trained("owner/model") == tmp_path
        assert len(asked) == 1

    @pytest.mark.parametrize("name", ["adapter", "./adapter", "/no/such/adapter", "no/such/adapter"])
    def test_other_names_are_folders(self, name: str, asked: list[object]) -> None:
        assert hub.find_trained(name) == Path(name)
        assert not asked

    def test_a_folder_that_is_there_wins(
        self, tmp_path: Path, asked: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "owner" / "adapter").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert hub.find_trained("owner/adapter") == Path("owner/adapter")
        assert not asked


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/models/owner/model"))


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    # The client's own HTTP library is a fork of httpx; of a response it reads the same.
    return kind(f"{status} Client Error.\nmore\nlines", response=response(status))  # type: ignore[arg-type]


REFUSALS: dict[str, tuple[Exception, str]] = {
    "gated": (
        http_error(GatedRepoError, 403),
        r"owner/model is gated: accept its licence at https://huggingface.co/owner/model, then set HF_TOKEN ",
    ),
    "unknown": (
        http_error(RepositoryNotFoundError, 401),
        "There is no folder 'owner/model', and no such model on https://huggingface.co, or it is private: .*HF_TOKEN",
    ),
    "revision": (http_error(RevisionNotFoundError, 404), "owner/model has no revision 'v1'"),
    "no network": (
        LocalEntryNotFoundError("Got: ConnectError\nAn error happened"),
        "no folder 'owner/model', not all of .* in the cache .* cannot be reached: check the network, or name a folder",
    ),
    "bad token": (http_error(HfHubHTTPError, 401), r"does not give owner/model: 401 Client Error; is HF_TOKEN valid"),
    "hub is down": (http_error(HfHubHTTPError, 503), r"does not give owner/model: 503 Client Error\.$"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), "disk of the cache .* is full: .*HF_HOME"),
    "anything": (
        httpx.ProxyError("no way\nout"),
        r"cannot be downloaded from .*: ProxyError: no way\.$",
    ),
}


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """What is told of an error of the hub's client."""

    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as caught:
        hub.find_model("owner/model", "v1")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value), "one line, for a terminal"
    return str(caught.value)


class TestRefusals:
    @pytest.mark.parametrize(("error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
    def test_each_is_one_line_with_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert re.search(message, refuse(monkeypatch, error))

    @pytest.mark.parametrize(
        "error",
        [LocalEntryNotFoundError("no"), OfflineModeIsEnabled("no"), IncompleteSnapshotError("no", snapshot_path="x")],
    )
    def test_offline(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        told = refuse(monkeypatch, error)
        assert "not all of the model owner/model is in the cache" in told
        assert "HF_HUB_OFFLINE forbids downloads" in told

    def test_a_mirror_is_named_where_one_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
        assert "https://mirror.example/owner/model" in refuse(monkeypatch, http_error(GatedRepoError, 403))


@dataclass
class Hub:
    """The part of the hub's interface that a download needs, for owner/model, owner/gated and owner/private."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def fake_hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
            commits = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
            if name == "owner/private" and not allowed:
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif name == "owner/gated" and not allowed and "resolve" in parts:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif "resolve" in parts:
                data = FILES["/".join(parts[4:])]
                self.answer(200, data, {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": parts[3]})
            elif "tree" in parts:
                self.answer(200, json.dumps(TREE).encode())
            elif parts[-1] in commits:
                self.answer(200, json.dumps({"id": name, "sha": commits[parts[-1]], "siblings": []}).encode())
            else:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


FIND_AND_FETCH = """
import logging, sys
from skippy.engine import CheckpointError, hub
logging.basicConfig(level=logging.INFO, format="%(message)s")
name, revision, weights = sys.argv[1], sys.argv[2] or None, sys.argv[3:]
try:
    folder = hub.find_model(name, revision)
    print(folder)
    if weights:
        print(hub.download(name, folder.name, weights))
except CheckpointError as error:
    print("refused:", error)
"""


def run(url: str, home: Path, name: str, *arguments: str, revision: str = "", **environ: str) -> list[str]:
    """The lines that a process of its own prints; its surroundings are read when the client is imported."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**known, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environ}
    command = [sys.executable, "-c", FIND_AND_FETCH, name, revision, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files_in(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


SHARD = "model-00001-of-00001.safetensors"


class TestDownloads:
    def test_small_files_first_and_then_the_weights_alone(self, fake_hub: Hub, tmp_path: Path) -> None:
        [folder] = run(fake_hub.url, tmp_path, "owner/model")
        assert files_in(folder) == SMALL
        assert Path(folder).name == COMMIT
        [_, again] = run(fake_hub.url, tmp_path, "owner/model", SHARD)
        assert again == folder
        assert files_in(folder) == {*SMALL, SHARD}
        assert (Path(folder) / SHARD).read_bytes() == LARGE
        fetched = [line for line in fake_hub.asked if line.startswith("GET /owner")]
        assert len(fetched) == len(set(fetched)) == len(SMALL) + 1, "each file once"

    def test_what_is_in_the_cache_needs_no_network(self, fake_hub: Hub, tmp_path: Path) -> None:
        [_, folder] = run(fake_hub.url, tmp_path, "owner/model", SHARD)
        asked = len(fake_hub.asked)
        assert run(fake_hub.url, tmp_path, "owner/model", SHARD, HF_HUB_OFFLINE="1") == [folder, folder]
        assert len(fake_hub.asked) == asked
        assert run("http://127.0.0.1:9", tmp_path, "owner/model", SHARD) == [folder, folder]

    def test_what_is_not_is_told_where_there_is_none(self, fake_hub: Hub, tmp_path: Path) -> None:
        [told] = run(fake_hub.url, tmp_path / "empty", "owner/model", HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE forbids downloads" in told
        [folder] = run(fake_hub.url, tmp_path, "owner/model")
        [still, told] = run(fake_hub.url, tmp_path, "owner/model", SHARD, HF_HUB_OFFLINE="1")
        assert still == folder
        assert told.startswith("refused: There is no folder 'owner/model', and not all of the model")
        [told] = run("http://127.0.0.1:9", tmp_path / "empty", "owner/model")
        assert "http://127.0.0.1:9 cannot be reached: check the network" in told

    def test_a_revision(self, fake_hub: Hub, tmp_path: Path) -> None:
        [folder] = run(fake_hub.url, tmp_path, "owner/model", revision="v1")
        assert Path(folder).name == OLDER
        [told] = run(fake_hub.url, tmp_path, "owner/model", revision="v2")
        assert told.startswith("refused: owner/model has no revision 'v2'")

    def test_a_gated_model_wants_a_token(self, fake_hub: Hub, tmp_path: Path) -> None:
        [told] = run(fake_hub.url, tmp_path, "owner/gated")
        assert told.startswith(f"refused: owner/gated is gated: accept its licence at {fake_hub.url}/owner/gated, then")
        [folder] = run(fake_hub.url, tmp_path, "owner/gated", HF_TOKEN=TOKEN)
        assert files_in(folder) == SMALL

    def test_a_private_model_looks_like_none(self, fake_hub: Hub, tmp_path: Path) -> None:
        [told] = run(fake_hub.url, tmp_path, "owner/private")
        assert told.startswith("refused: There is no folder 'owner/private', and no such model")
        [folder] = run(fake_hub.url, tmp_path, "owner/private", HF_TOKEN=TOKEN)
        assert files_in(folder) == SMALL
