"""What operators and probes ask: /health, /version and /metrics."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from skippy.server import DISTRIBUTION
from skippy.server.metrics import Metrics
from skippy.server.models import Serving
from skippy.server.sse import json_response


def router(serving: Serving, metrics: Metrics) -> APIRouter:
    routes = APIRouter()
    release = {"version": version(DISTRIBUTION)}

    @routes.get("/health")
    async def health() -> Response:
        """200 while requests can be served, otherwise 503 with the reason."""
        if serving.failure is not None:
            return json_response({"status": "dead", "reason": serving.failure}, 503)
        if serving.loading:
            progress = serving.client.loaded
            answer = {"status": "loading", "reason": "The model is still loading.", "progress": progress}
            return json_response(answer, 503)
        return json_response({"status": "ok"})

    @routes.get("/version")
    async def show_version() -> Response:
        return json_response(release)

    @routes.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
