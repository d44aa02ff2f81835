"""Fixtures that several test modules share."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import tokenizers
import uvicorn
import uvloop
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

# One thread each: tests share the cores with the servers that they start, and PyTorch's
# threads wait for each other. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from skippy.engine import Tokenizer
from skippy.engine.drafters import eagle3, recycling, s3d, suffix
from skippy.server.app import create_app
from skippy.server.client import AsyncEngineClient
from skippy.server.settings import Settings

BUILTIN = Path(__file__).parents[1] / "engine" / "builtin"
STUB_WORKER = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


def _byte_level(template: str | None = None) -> tokenizers.Tokenizer:
    """Ids 0..255 are the bytes, 256 is <s>, 257 a plain added token."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens([AddedToken("two words", special=False)])
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 256)])
    return backend


def _sentencepiece(metaspace: bool) -> tokenizers.Tokenizer:
    """<unk> and <s>, the bytes as ids 2..257, then a few words; in either way of marking words."""
    words = ["▁", "a", "t", "o", "é", "▁a", "to", "▁to"]
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [("▁", "a"), ("t", "o"), ("▁", "to")]
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., tokenizers.Tokenizer]:
    """Builds a byte-level tokenizer, with a post-processing template if one is given."""
    return _byte_level


@pytest.fixture(scope="session", params=["strip", "metaspace"])
def sentencepiece(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer with word marks and byte fallback."""
    return Tokenizer(_sentencepiece(metaspace=request.param == "metaspace"), "<s>")


@pytest.fixture(autouse=True)
def all_that_is_drafted_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models and adapters of most tests are random, and nothing is likely: drafts would be cut to nothing."""
    for module in (eagle3, recycling, s3d, suffix):
        monkeypatch.setattr(module, "MIN_REACH", 0.0)


@pytest.fixture(scope="session", autouse=True)
def no_plan_that_somebody_tuned_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Must decide what tests see; engine processes inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", params=["builtin", "bytes", "strip", "metaspace", "stories"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    match request.param:
        case "builtin":
            return Tokenizer.load(BUILTIN)
        case "bytes":
            return Tokenizer(_byte_level("<s> $A"), "<s>")
        case "stories":
            if not STORIES.is_dir():
                pytest.skip("the stories260K checkpoint is not at hand")
            return Tokenizer.load(STORIES)
        case kind:
            return Tokenizer(_sentencepiece(metaspace=kind == "metaspace"), "<s>")


class LiveServer:
    """A server on a loopback port, in a thread of its own.

    Attributes:
        engine_pid: the engine process, there from the start.
    """

    def __init__(self, settings: Settings, worker_command: tuple[str, ...]) -> None:
        self._settings = settings
        self._command = worker_command
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.engine_pid = 0

    def __enter__(self) -> LiveServer:
        self._thread.start()
        self.engine_pid = self._started.result(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    def wait_until_loaded(self) -> LiveServer:
        """Returns once /health says that requests can be served."""
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as http:
            while (answer := http.get(f"{self.url}/health")).json()["status"] == "loading":
                threading.Event().wait(0.01)
        assert answer.status_code == 200, answer.text
        return self

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        client = await AsyncEngineClient.start(self._settings.engine_config(), self._command)
        try:
            app = create_app(client, self._settings)
            self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
            serving = asyncio.create_task(self._server.serve([self._listener]))
            self._started.set_result(client.pid)
            await serving
        finally:
            await client.close()


ServerFactory = Callable[..., AbstractContextManager[LiveServer]]


@pytest.fixture(scope="session")
def server_with() -> ServerFactory:
    """Starts a server on the scripted engine: options for that as arguments, settings as keywords."""

    @contextmanager
    def start(*worker_options: str, **settings: object) -> Iterator[LiveServer]:
        with LiveServer(Settings.model_validate(settings), (*STUB_WORKER, *worker_options)) as server:
            yield server

    return start


@pytest.fixture(scope="session")
def server(server_with: ServerFactory) -> Iterator[LiveServer]:
    """A loaded server on the scripted engine, for tests that leave it as it was."""
    with server_with() as server:
        yield server.wait_until_loaded()
