"""Passes a request on to a llama.cpp server and its answer back, byte for byte.

Chunks go through as they come. A client that goes away cancels the work upstream; a server
that dies ends the stream with an error event, never with a silent stop that looks complete.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import aiohttp
from starlette.types import Receive, Scope, Send
from yarl import URL

from llama_gpu.errors import ServerExitedError
from llama_gpu.openai import BadRequestError, error_reply

__all__ = ["ClientGone", "Upstream", "read_body", "relay", "send_error"]

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer trailers "
    b"transfer-encoding upgrade".split()
)
_NOT_FORWARDED = _HOP_BY_HOP | {b"host", b"content-length", b"authorization", b"x-api-key", b"expect"}


class ClientGone(Exception):  # noqa: N818 - not an error of ours: the client left
    """The client closed its connection before the answer was complete."""


async def read_body(receive: Receive, *, limit_bytes: int) -> bytes:
    """The whole request body.

    Raises:
        BadRequestError: more than ``limit_bytes``.
        ClientGone: the client left while sending.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise BadRequestError(f"the body is larger than {limit_bytes} bytes", status=413)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def until_client_leaves(receive: Receive) -> None:
    """Return when the client has closed its connection; call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class Upstream:
    """The server that answers: its address, its key, and the model's id for messages.

    ``headers`` are added to its answers. ``why_stopped`` tells, once a stream was cut, why the server was
    stopped, if it was.
    """

    session: aiohttp.ClientSession
    base_url: str
    api_key: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    why_stopped: Callable[[], str | None] = lambda: None


async def relay(scope: Scope, receive: Receive, send: Send, *, body: bytes, upstream: Upstream) -> int:
    """Send the request upstream and stream the answer; returns its status.

    Raises:
        ServerExitedError: no answer came; nothing was sent to the client yet.
        ClientGone: the client left; the request upstream was cancelled.
    """
    forward = asyncio.ensure_future(_forward(scope, send, body, upstream))
    gone = asyncio.ensure_future(until_client_leaves(receive))
    try:
        await asyncio.wait({forward, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not forward.done():
            raise ClientGone
        return await forward
    finally:
        for task in (forward, gone):
            task.cancel()
        await asyncio.gather(forward, gone, return_exceptions=True)


async def _forward(scope: Scope, send: Send, body: bytes, upstream: Upstream) -> int:
    url = upstream.base_url + scope["raw_path"].decode("ascii")
    if query := scope["query_string"]:
        url += "?" + query.decode("ascii")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in _kept(scope["headers"])}
    headers["Authorization"] = f"Bearer {upstream.api_key}"
    try:
        response = await upstream.session.request(
            scope["method"],
            URL(url, encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
    except (aiohttp.ClientError, OSError) as error:
        why = upstream.why_stopped() or str(error) or type(error).__name__
        message = f"the server of {upstream.model!r} did not answer: {why}"
        raise ServerExitedError(message, model=upstream.model) from error
    async with response:
        await _stream_back(response, send, upstream)
        return response.status


async def _stream_back(response: aiohttp.ClientResponse, send: Send, upstream: Upstream) -> None:
    headers = [
        (name.lower(), value) for name, value in response.raw_headers if name.lower() not in _HOP_BY_HOP
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in upstream.headers.items()]
    is_event_stream = response.content_type == "text/event-stream"
    if is_event_stream:
        headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    try:
        async for chunk in response.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except (aiohttp.ClientError, OSError) as error:
        model, reason = upstream.model, upstream.why_stopped()
        how = f"died while it answered: {error}" if reason is None else f"was stopped: {reason}"
        broken = ServerExitedError(f"the server of {model!r} {how}", model=model)
        if not is_event_stream:
            return  # unfinished on purpose: the connection is cut short and the client sees it
        event = json.dumps(error_reply(broken, model=model).body)
        await send({"type": "http.response.body", "body": f"\n\ndata: {event}\n\n".encode()})
        return
    await send({"type": "http.response.body", "body": b""})


def _kept(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]


async def send_error(send: Send, error: Exception, *, model: str | None = None) -> int:
    """Answer with the OpenAI-shaped envelope of ``error``; returns its status."""
    reply = error_reply(error, model=model)
    body = json.dumps(reply.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in reply.headers.items()),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return reply.status
