"""The routes. Ours are few; everything else goes to the model that the request names."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import parse_qs

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_gpu.api.health import health
from llama_gpu.catalog import ModelEntry
from llama_gpu.errors import LlamaGpuError
from llama_gpu.openai import BadRequestError, requested_model
from llama_gpu.relay import ClientGone, Upstream, read_body, relay, send_error
from llama_gpu.supervisor import Supervisor

__all__ = ["build_app"]

MAX_BODY_BYTES = 512 << 20
"""The largest request body: pictures and audio travel inside, whole models do not."""

_log = structlog.get_logger("llama_gpu")


def build_app(supervisor: Supervisor) -> ASGIApp:
    """The ASGI application over a running supervisor."""
    ours = _OurRoutes(supervisor)
    app = Starlette(
        routes=[
            Route("/health", ours.health, methods=["GET"]),
            Route("/v1/models", ours.models, methods=["GET"]),
            Route("/models", ours.models, methods=["GET"]),
            Route("/v1/models/{model:path}", ours.model, methods=["GET"]),
            Mount("/", app=_Relayed(supervisor)),
        ]
    )
    return _KeyCheck(app, supervisor.config.server.api_keys)


class _OurRoutes:
    """What we answer ourselves."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def health(self, _request: Request) -> Response:
        return JSONResponse(health(self._supervisor).model_dump(mode="json"))

    async def models(self, _request: Request) -> Response:
        await self._supervisor.rescan()
        catalog = self._supervisor.catalog
        return JSONResponse(
            {
                "object": "list",
                "data": [self._described(entry) for entry in catalog.models],
                "broken": [
                    {"id": entry.id, "path": str(entry.path), "reason": entry.error}
                    for entry in catalog.broken
                ],
            }
        )

    async def model(self, request: Request) -> Response:
        entry = await self._supervisor.look_up(request.path_params["model"])
        return JSONResponse(self._described(entry))

    def _described(self, entry: ModelEntry) -> dict[str, Any]:
        held = self._supervisor.residents().get(entry.id)
        header = entry.header
        return {
            "id": entry.id,
            "object": "model",
            "created": self._supervisor.started_at,
            "owned_by": "llama-gpu",
            "aliases": list(entry.aliases),
            "status": {"value": "unloaded" if held is None else str(held.resident.state)},
            "meta": None
            if header is None
            else {
                "architecture": header.architecture,
                "n_params": header.parameter_count,
                "n_ctx_train": header.trained_context_length,
                "quantization": header.quantization,
                "size": header.file_bytes,
            },
        }


class _Relayed:
    """Every path of llama-server, for the model that the request names."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        named: str | None = None
        try:
            body = await read_body(receive, limit_bytes=MAX_BODY_BYTES)
            headers = dict(scope["headers"])
            query = parse_qs(scope["query_string"].decode("latin-1"))
            named = requested_model(
                body, headers.get(b"content-type", b"").decode("latin-1"), query.get("model", [None])[0]
            )
            entry = await self._supervisor.look_up(named)
            async with self._supervisor.acquire(entry.id) as server:
                upstream = Upstream(self._supervisor.session, server.base_url, server.api_key, entry.id)
                await relay(scope, receive, send, body=body, upstream=upstream)
        except ClientGone:
            _log.debug("client left", model=named)
        except LlamaGpuError as error:
            await send_error(send, error, model=named)


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
