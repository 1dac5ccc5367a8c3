"""`GET /metrics` for Prometheus: the pools, and how the gateway itself fares."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgpark import calls
from pgpark.gateway.caller import Caller
from pgpark.gateway.errors import documented
from pgpark.metrics import pool_text

router = APIRouter(tags=["metrics"])

_METHODS = frozenset(("GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"))
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """What a gateway counts of itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pgpark_gateway_requests", "Requests that were answered.", ["method", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "pgpark_gateway_request_seconds", "Until an answer began.", ["method", "route"],
            buckets=_BOUNDS, registry=self.registry,
        )  # fmt: skip


class Measured:
    """ASGI middleware around everything else. Routes are labelled by their pattern, so there are few."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = getattr(scope.get("route"), "path", None) or "none"
                self._metrics.requests.labels(method, route, str(message["status"])).inc()
                self._metrics.seconds.labels(method, route).observe(time.perf_counter() - began)
            await send(message)

        return await self._app(scope, receive, sending)


@router.get("/metrics", response_class=Response, responses=documented() | {200: {"content": {"text/plain": {}}}})
async def metrics(caller: Caller, request: Request) -> Response:
    """The numbers of each pool that the caller may see, and the gateway's own, as Prometheus reads them."""
    pools = pool_text(await caller.call(calls.metrics()))
    own: Any = request.app.state.metrics
    return Response(
        pools + generate_latest(own.registry),
        headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"},
    )
