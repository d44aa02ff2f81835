"""The HTTP application, and `run_server`, which serves it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version

import uvicorn
import uvloop
from fastapi import FastAPI

from skippy.engine import EngineDead
from skippy.server import DISTRIBUTION, completions, errors, models, ops
from skippy.server.client import WORKER_COMMAND, AsyncEngineClient
from skippy.server.limits import Admission
from skippy.server.metrics import Metrics
from skippy.server.models import Serving
from skippy.server.settings import Settings

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 8
"""How long answers in flight may take after the signal to stop; containers get 10 in all."""
KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than the minute for which most proxies keep theirs."""
EXIT_CANNOT_START = 2


def create_app(client: AsyncEngineClient, settings: Settings) -> FastAPI:
    """The application in front of an engine. Its lifespan loads the tokenizer and logs the load.

    The client stays the caller's to close. `app.state.serving` tells when the model is loaded.
    """
    serving = Serving(client, settings.served_model_name or settings.engine_config().model)
    metrics = Metrics()
    client.on_step = metrics.observe_step

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(serving.load(), name="load"),
            asyncio.create_task(metrics.log_load(settings.log_interval), name="log load"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # The interactive pages would load scripts from elsewhere; the schema is at /openapi.json.
    app = FastAPI(title="Skippy", version=version(DISTRIBUTION), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = serving
    errors.install(app)
    app.include_router(completions.router(serving, metrics, Admission(settings.max_waiting)))
    app.include_router(models.router(serving))
    app.include_router(ops.router(serving, metrics))
    return app


def run_server(settings: Settings, worker_command: Sequence[str] = WORKER_COMMAND) -> int:
    """Serve until SIGTERM or SIGINT, finishing what is in flight. Returns the exit code.

    An engine that dies later leaves the server up, to say so; one that cannot load ends it
    with code 2 and one line on standard error, as an address that is taken does.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        return _cannot_start(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}")
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, listener, worker_command))


class _Server(uvicorn.Server):
    """Leaves the signals to `_serve`; uvicorn would end the process by them before the engine is closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(settings: Settings, listener: socket.socket, worker_command: Sequence[str]) -> int:
    client = await AsyncEngineClient.start(settings.engine_config(), worker_command, settings.log_level)
    try:
        app = create_app(client, settings)
        config = uvicorn.Config(
            app,
            http="httptools",
            log_config=None,
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            access_log=settings.log_level == "debug",
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        server = _Server(config)
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            server.handle_exit(number, None)
            # Whoever is not served by then hears why, while there is still time to tell.
            loop.call_later(DRAIN_SECONDS - 1, client.give_up, "The server is shutting down.")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        listening = asyncio.create_task(server.serve([listener]), name="serve")
        failure = await _load_failure(app.state.serving, listening)
        if failure is not None:
            server.should_exit = True
        elif not listening.done():
            host, port, *_ = listener.getsockname()
            logger.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        await listening
        return 0 if failure is None else _cannot_start(failure)
    finally:
        await client.close()


async def _load_failure(serving: Serving, listening: asyncio.Task[None]) -> str | None:
    """Why the model cannot be loaded; None once it is, or if the server stops before."""
    loading = asyncio.create_task(serving.wait())
    try:
        await asyncio.wait({loading, listening}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        return None
    except EngineDead as error:
        return str(error)
    finally:
        loading.cancel()


def _cannot_start(reason: str) -> int:
    sys.stderr.write(f"skippy: error: {reason}\n")
    return EXIT_CANNOT_START
