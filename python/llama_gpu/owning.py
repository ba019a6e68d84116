"""One task owns one server: from the decision to start it until its memory is back.

The claim that the scheduler made with that decision lives as long as the task: however the task
ends, its end is told, so that no claim outlives its server and no server its claim.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from llama_gpu import Gpu
from llama_gpu.budget import is_back
from llama_gpu.counts import Counts
from llama_gpu.effects import Effect, Start, Stop
from llama_gpu.errors import LlamaGpuError, ServerError, ServerExitedError
from llama_gpu.events import StateChanges
from llama_gpu.monitor import GpuMonitor
from llama_gpu.residents import LeavesFor, Resident, ResidentState
from llama_gpu.scheduler import Scheduler
from llama_gpu.server import Server

__all__ = ["Owning"]

FRESH_SECONDS = 0.25
"""How long a decision waits for a fresh snapshot; also the pace while memory comes back."""

RECHECK_SECONDS = 0.05
"""The pause between two looks at memory that is not back yet."""

_log = structlog.get_logger("llama_gpu")

Decide = Callable[[Callable[[float], list[Effect]]], None]


class Owning:
    """Owns the servers by their ids.

    ``decide`` takes an event to the scheduler and carries out what follows, ``make`` makes the server of a
    decision, which is not started yet, and ``became_ready`` hears of one that answers and returns what
    it was measured to hold, in bytes by GPU UUID.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        monitor: GpuMonitor,
        *,
        decide: Decide,
        make: Callable[[Start], Awaitable[Server]],
        became_ready: Callable[[Start, Server], Awaitable[dict[str, int] | None]],
        counts: Counts,
        changes: StateChanges,
    ) -> None:
        self.servers: dict[str, Server] = {}
        self.closing = False
        self._scheduler = scheduler
        self._monitor = monitor
        self._decide = decide
        self._make = make
        self._became_ready = became_ready
        self._counts = counts
        self._changes = changes
        self._before_stop: dict[str, Sequence[Gpu]] = {}

    async def own(self, start: Start) -> None:
        """Carry out ``start``, and return when all that it took is given back."""
        resident = self._scheduler.residents[start.server]
        failure: LlamaGpuError | None = None
        try:
            await self._live(start, resident)
        except LlamaGpuError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever it was, its requests must end
            _log.exception(f"the server {start.server} failed")
            failure = ServerError(f"the server of {start.model} failed: {error!r}", model=start.model)
        if self.closing:
            return
        try:
            self._ended(start, resident, failure)
            await self._until_memory_is_back(resident)
        finally:
            self.servers.pop(start.server, None)
            self._release(start, resident, failure)

    async def stop(self, stop: Stop) -> None:
        """Carry out ``stop``: the owner of the server tells when it is gone."""
        if server := self.servers.get(stop.server):
            self._before_stop[stop.server] = self._monitor.snapshot.gpus
            server.stop_reason = stop.reason
            # On a lost GPU it hangs in the driver: it would not hear a polite word.
            await server.stop(grace_seconds=0 if stop.cause is LeavesFor.GPU_LOST else None)

    async def _live(self, start: Start, resident: Resident) -> None:
        server = await self._make(start)
        if resident.state is ResidentState.STOPPING:
            return  # it was told to leave before there was anything to stop
        self.servers[start.server] = server
        try:
            await server.start()
            _log.info(
                f"{start.server} is ready after {server.started_seconds or 0.0:.2f} s",
                pid=server.pid,
                port=server.port,
            )
            measured = await self._became_ready(start, server)
            self._decide(
                lambda now: self._scheduler.server_ready(start.server, now, measured_by_gpu=measured)
            )
            await server.wait_exited()
        finally:
            await server.stop()

    def _ended(self, start: Start, resident: Resident, failure: LlamaGpuError | None) -> None:
        """The process is gone. What ended without being told to is a failure."""
        if resident.state is ResidentState.LOADING:
            failure = failure or ServerError(f"{start.model} did not start", model=start.model)
            _log.error(f"{start.server} did not start: {failure}")
            self._counts.failed(failure)
            self._changes.server_failed(start.server, str(failure))
        elif resident.state is ResidentState.READY:
            code = self.servers[start.server].exit_code
            why = f"the server of {start.model} ended by itself with exit code {code}"
            _log.error(why)
            self._counts.failed(ServerExitedError(why, model=start.model, exit_code=code))
            # At once: until its memory is known to be back, nobody may be sent to it.
            self._decide(lambda now: self._scheduler.server_exited(start.server, now, reason=why))

    async def _until_memory_is_back(self, resident: Resident) -> None:
        claim = replace(resident.claim, settled=resident.ready_at is not None)
        before = self._before_stop.pop(resident.server, self._monitor.snapshot.gpus)
        seconds = self._scheduler.limits.settle_seconds
        deadline = time.monotonic() + seconds
        while claim.bytes_by_gpu:
            await self._monitor.refresh(timeout_seconds=FRESH_SECONDS)
            if is_back(claim, before, self._monitor.snapshot.gpus):
                break
            if time.monotonic() >= deadline:
                _log.warning(
                    f"{resident.server} is gone, but its memory is not back after {seconds:g} s: "
                    "from now on it counts as somebody else's"
                )
                break
            await asyncio.sleep(RECHECK_SECONDS)

    def _release(self, start: Start, resident: Resident, failure: LlamaGpuError | None) -> None:
        if resident.state is ResidentState.LOADING:
            error = failure or ServerError(f"{start.model} did not start", model=start.model)
            self._decide(lambda now: self._scheduler.server_failed(start.server, error, now))
        else:
            self._decide(lambda now: self._scheduler.server_stopped(start.server, now))
