"""The routes. Ours are few; everything else goes to the model that the request names."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs

import structlog
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_gpu.affinity import conversation_in
from llama_gpu.api.document import docs_page, openapi_document
from llama_gpu.api.events import events_response
from llama_gpu.api.gpus import gpus
from llama_gpu.api.health import health
from llama_gpu.api.metrics import MEDIA_TYPE, Metrics
from llama_gpu.api.models import model_card, model_list
from llama_gpu.api.plan import plan_answer
from llama_gpu.catalog import ModelEntry
from llama_gpu.errors import LlamaGpuError
from llama_gpu.openai import BadRequestError, error_reply, requested_model
from llama_gpu.relay import ClientGone, Upstream, read_body, relay, send_error
from llama_gpu.supervisor import Supervisor

__all__ = ["build_app"]

MAX_BODY_BYTES = 512 << 20
"""The largest request body: pictures and audio travel inside, whole models do not."""

DEGRADED = "X-Llama-Gpu-Degraded"
"""Tells, in every answer of a server, what it was started without because it would not fit."""

MAX_QUESTION_BYTES = 1 << 20
"""The largest question of our own routes."""

CLIENT_LEFT = 499
"""What the metrics call the status of an answer that nobody waited for."""

Handler = Callable[[Request], Awaitable[Response]]

_log = structlog.get_logger("llama_gpu")


def build_app(supervisor: Supervisor) -> ASGIApp:
    """The ASGI application over a running supervisor."""
    ours = _OurRoutes(supervisor)
    ours_alone: list[tuple[str, Handler]] = [
        ("/health", ours.health),
        ("/v1/models", ours.models),
        ("/models", ours.models),
        ("/v1/models/{model:path}", ours.model),
        ("/api/gpus", ours.gpus),
        ("/api/events", ours.events),
        ("/metrics", ours.metrics),
        ("/openapi.json", ours.document),
        ("/docs", ours.page),
    ]
    app = Starlette(
        routes=[
            *(Route(path, handler, methods=["GET"]) for path, handler in ours_alone),
            Route("/api/plan", ours.plan, methods=["POST"]),
            Mount("/", app=_Relayed(supervisor)),
        ],
        exception_handlers={HTTPException: _no_such_route},
    )
    return _KeyCheck(app, supervisor.config.server.api_keys)


class _OurRoutes:
    """What we answer ourselves."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._metrics = Metrics(supervisor)

    async def health(self, _request: Request) -> Response:
        return _json(health(self._supervisor))

    async def models(self, _request: Request) -> Response:
        await self._supervisor.rescan()
        return _json(model_list(self._supervisor))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        try:
            entry = await self._supervisor.look_up(name)
        except LlamaGpuError as error:
            reply = error_reply(error, model=name)
            return JSONResponse(reply.body, reply.status, reply.headers)
        return _json(model_card(self._supervisor, entry))

    async def gpus(self, _request: Request) -> Response:
        return _json(gpus(self._supervisor))

    async def plan(self, request: Request) -> Response:
        try:
            body = await read_body(request.receive, limit_bytes=MAX_QUESTION_BYTES)
            return _json(await plan_answer(self._supervisor, body))
        except LlamaGpuError as error:
            reply = error_reply(error)
            return JSONResponse(reply.body, reply.status, reply.headers)

    async def events(self, _request: Request) -> Response:
        return events_response(self._supervisor.changes)

    async def metrics(self, _request: Request) -> Response:
        return Response(await self._metrics.scrape(), headers={"content-type": MEDIA_TYPE})

    async def document(self, _request: Request) -> Response:
        return JSONResponse(openapi_document())

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(docs_page())


async def _no_such_route(_request: Request, error: Exception) -> Response:
    """For a path that not even a model's server could have, such as one with a line break in it."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for no other
    reply = error_reply(BadRequestError("there is no such path", status=error.status_code))
    return JSONResponse(reply.body, reply.status, reply.headers)


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


class _Relayed:
    """Every path of llama-server, for the model that the request names."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        named: str | None = None
        entry: ModelEntry | None = None
        status = CLIENT_LEFT
        try:
            body = await read_body(receive, limit_bytes=MAX_BODY_BYTES)
            headers = dict(scope["headers"])
            query = parse_qs(scope["query_string"].decode("latin-1"))
            named = requested_model(
                body, headers.get(b"content-type", b"").decode("latin-1"), query.get("model", [None])[0]
            )
            entry = await self._supervisor.look_up(named)
            # With one server at most there is nothing to choose.
            conversation = conversation_in(body) if entry.options.most_replicas > 1 else None
            async with self._supervisor.acquire(entry.id, conversation) as server:
                upstream = Upstream(
                    self._supervisor.session,
                    server.base_url,
                    server.api_key,
                    entry.id,
                    headers={DEGRADED: ", ".join(server.degraded)} if server.degraded else {},
                    why_stopped=lambda: server.stop_reason,
                )
                status = await relay(scope, receive, send, body=body, upstream=upstream)
        except ClientGone:
            _log.debug("client left", model=named)
        except LlamaGpuError as error:
            status = await send_error(send, error, model=named)
        finally:
            if entry is not None:
                self._supervisor.counts.answered(entry.id, status)


class _KeyCheck:
    """Asks for one of the configured keys, everywhere but on ``/health``."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] != "/health" and not self._allowed(scope):
            error = BadRequestError("a valid API key is needed: Authorization: Bearer KEY", status=401)
            await send_error(send, error)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return any(hmac.compare_digest(given, key) for key in self._keys)
