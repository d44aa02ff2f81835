"""Which model is served, whether it is ready, and /v1/models."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from fastapi import APIRouter, Response

from skippy.engine import EngineDead, EngineInfo, SkippyError, Tokenizer
from skippy.server.client import AsyncEngineClient
from skippy.server.errors import ApiError
from skippy.server.schemas import ModelCard, ModelList
from skippy.server.sse import json_response

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model under its public name; `created` is in seconds since the epoch."""

    id: str
    created: int
    info: EngineInfo
    tokenizer: Tokenizer

    def card(self) -> ModelCard:
        return ModelCard(self.id, self.created, self.info.max_model_len, self.info.model)


class Serving:
    """The engine behind the server, from its start over its readiness to its possible death."""

    def __init__(self, client: AsyncEngineClient, name: str) -> None:
        self.client = client
        self._name = name
        self._model: ServedModel | None = None
        self._failure: str | None = None
        self._settled = asyncio.Event()

    async def load(self) -> None:
        """Wait for the engine and read the tokenizer; `wait` and `failure` tell how it went."""
        try:
            info = await self.client.ready()
            # A large vocabulary takes a second, in which /health must answer.
            tokenizer = await asyncio.to_thread(Tokenizer.load, info.model_path)
            self._model = ServedModel(self._name, int(time.time()), info, tokenizer)
        except SkippyError as error:
            self._failure = str(error)
        except Exception as error:
            logger.exception("The model cannot be loaded.")
            self._failure = f"The model cannot be loaded: {error}"
        self._settled.set()  # not when cancelled: the server stops before it knows

    async def wait(self) -> ServedModel:
        """The model, once it is loaded.

        Raises:
            EngineDead: it cannot be.
        """
        await self._settled.wait()
        if self._model is None or self.failure is not None:
            raise EngineDead(self.failure)
        return self._model

    @property
    def failure(self) -> str | None:
        """Why nothing can be served any more; None while it can, or may soon."""
        return self.client.dead or self._failure

    @property
    def loading(self) -> bool:
        return self._model is None and self.failure is None

    def model(self, name: str | None = None) -> ServedModel:
        """The model of that name, or the only one there is.

        Raises:
            EngineDead: nothing can be served any more.
            ApiError: 503 while it loads, 404 for another name.
        """
        if self.failure is not None:
            raise EngineDead(self.failure)
        if self._model is None:
            raise ApiError(503, "The model is still loading.", code="model_loading", headers={"retry-after": "1"})
        if name is not None and name != self._model.id:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self._model.id!r}.",
                param="model",
                code="model_not_found",
            )
        return self._model


def router(serving: Serving) -> APIRouter:
    """/v1/models and /v1/models/{id}."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> Response:
        return json_response(ModelList([serving.model().card()]))

    @routes.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        return json_response(serving.model(name).card())

    return routes
