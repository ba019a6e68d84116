"""Brings GPU snapshots onto the event loop.

The core's ``Monitor`` owns the driver and never makes a reader wait for long; the thread here
waits for it in the loop's place, so that neither the loop nor the end of the program ever
waits for a driver that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from llama_gpu import GpuSnapshot, Monitor

__all__ = ["GpuMonitor"]

REFRESH_TIMEOUT_SECONDS = 2.0


class GpuMonitor:
    """Samples every ``interval_seconds`` and whenever ``refresh`` is awaited.

    ``on_snapshot`` is called on the event loop with every new snapshot. ``off_reason`` set
    means GPU support is switched off: the driver is never touched and the snapshot is empty
    with that reason.
    """

    def __init__(
        self,
        *,
        interval_seconds: float = 5.0,
        off_reason: str | None = None,
        on_snapshot: Callable[[GpuSnapshot], None] = lambda _snapshot: None,
    ) -> None:
        self.interval_seconds = interval_seconds
        self.on_snapshot = on_snapshot
        self.snapshot = GpuSnapshot([], error=off_reason or "the GPUs have not been looked at yet")
        self._off = off_reason is not None
        self._monitor: Monitor | None = None
        self._began = time.monotonic()
        self._wanted = threading.Event()
        self._closed = False
        self._asked = 0
        self._answered = 0
        self._published = asyncio.Event()

    @property
    def age_seconds(self) -> float:
        """How old the last snapshot is; 0 where there is nothing to look at."""
        if self._off:
            return 0.0
        age = self._monitor.age_seconds if self._monitor else None
        return time.monotonic() - self._began if age is None else age

    @property
    def ages(self) -> dict[str, float]:
        """Seconds since each GPU answered, by UUID."""
        return self._monitor.ages if self._monitor else {}

    async def start(self) -> None:
        """Take the first snapshot (bounded wait) and keep sampling until ``close``."""
        if self._off:
            return
        self._monitor = Monitor(interval_seconds=self.interval_seconds)
        arguments = (self._monitor, asyncio.get_running_loop())
        threading.Thread(target=self._sample, args=arguments, name="gpu-snapshots", daemon=True).start()
        await self.refresh()

    def close(self) -> None:
        """Stop sampling. A call that hangs in the driver is left behind, never joined."""
        self._closed = True
        self._wanted.set()

    async def refresh(self, timeout_seconds: float = REFRESH_TIMEOUT_SECONDS) -> bool:
        """Wait for a snapshot begun after this call; False when the driver took too long."""
        if self._monitor is None or self._closed:
            return True
        self._asked += 1
        ticket = self._asked
        self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while self._answered < ticket:
                    await self._published.wait()
                return True
        return False

    def _sample(self, monitor: Monitor, loop: asyncio.AbstractEventLoop) -> None:
        done = -1  # the first look is a refresh: what nobody has read yet is no snapshot
        while not self._closed:
            self._wanted.clear()
            asked = self._asked  # read after the clearing: who asks from here on sets it again
            snapshot = monitor.refresh() if asked > done else monitor.snapshot()
            done = asked
            try:
                loop.call_soon_threadsafe(self._publish, snapshot, done)
            except RuntimeError:  # the loop is closed, and so is the proxy
                break
            self._wanted.wait(self.interval_seconds)
        monitor.close()

    def _publish(self, snapshot: GpuSnapshot, asked: int) -> None:
        if self._closed:
            return
        self.snapshot = snapshot
        self._answered = max(self._answered, asked)
        self.on_snapshot(snapshot)
        self._published.set()
        self._published.clear()  # wakes whoever waits now; later ones wait for the next snapshot
