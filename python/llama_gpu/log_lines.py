"""Lines from a child's output, handed on as they come."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import cast

__all__ = ["LogLines"]

LONGEST_LINE_BYTES = 16 * 1024  # the rest is dropped: a child that writes no newline must not fill memory


class LogLines(asyncio.Protocol):
    """The read end of a pipe that a child writes its output to."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._partial = b""
        self._closed = asyncio.Event()
        self._transport: asyncio.ReadTransport | None = None

    @classmethod
    async def open(cls, take: Callable[[str], None]) -> tuple[LogLines, int]:
        """Make a pipe; returns its reader and the descriptor to give to the child (and then close)."""
        read_end, write_end = os.pipe()
        try:
            loop = asyncio.get_running_loop()
            reader, lines = os.fdopen(read_end, "rb", 0), cls(take)
            await loop.connect_read_pipe(lambda: lines, reader)
        except BaseException:
            os.close(write_end)
            raise
        return lines, write_end

    async def closed(self, timeout_seconds: float) -> None:
        """Wait until everything was read, no longer than the time given, and close."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._closed.wait()
        except TimeoutError:
            pass  # a process that left the group keeps the pipe open
        finally:
            if self._transport is not None:
                self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._transport = cast("asyncio.ReadTransport", transport)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._hand_on(line)
        self._partial = self._partial[:LONGEST_LINE_BYTES]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002, D102
        if self._partial:
            self._hand_on(self._partial)
            self._partial = b""
        self._closed.set()

    def _hand_on(self, line: bytes) -> None:
        self._take(line[:LONGEST_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"))
