"""``GET /api/events``: state changes as server-sent events, until the client leaves or the proxy ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from llama_gpu.events import Change, Dropped, Listener, StateChanges

__all__ = ["events_response", "stream"]

HEARTBEAT_SECONDS = 15.0
"""Proxies in between cut a connection that says nothing for long."""


def events_response(changes: StateChanges) -> StreamingResponse:
    """The endless answer. What it holds for a slow client is bounded (``events.py``)."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_listen(changes), media_type="text/event-stream", headers=headers)


async def _listen(changes: StateChanges) -> AsyncIterator[str]:
    with changes.listen() as listener:
        async for text in stream(listener, heartbeat_seconds=HEARTBEAT_SECONDS):
            yield text


async def stream(listener: Listener, *, heartbeat_seconds: float) -> AsyncIterator[str]:
    """The changes in the wire format, with a comment whenever nothing happened for a while."""
    yield ": state changes of GPUs and servers, the present states first\n\n"
    while True:
        try:
            async with asyncio.timeout(heartbeat_seconds):
                change = await listener.next()
        except TimeoutError:
            yield ": still here\n\n"
            continue
        if change is None:
            return
        yield _event(change)


def _event(change: Change | Dropped) -> str:
    return f"event: {change.kind}\ndata: {change.model_dump_json()}\n\n"
