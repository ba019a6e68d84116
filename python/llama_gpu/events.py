"""State changes of GPUs and servers: found by comparing, told to whoever listens.

``StateChanges`` keeps the states that were told last. A listener that does not keep up
loses the oldest changes, is told how many, and costs nobody else anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llama_gpu import Gpu
from llama_gpu.residents import LeavesFor, Resident, ResidentState

__all__ = ["Change", "Dropped", "GpuChange", "Listener", "ServerChange", "StateChanges", "gpu_state"]

KEPT_FOR_A_SLOW_LISTENER = 256

GpuState = Literal["available", "assigned", "error"]
ServerState = Literal["starting", "running", "stopping", "stopped", "error"]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True)


class GpuChange(_Told):
    """A GPU is available, has a model assigned, or is in error. ``time`` in seconds since 1970."""

    kind: Literal["gpu"] = "gpu"
    id: Annotated[int, Field(ge=0)]
    uuid: str
    state: GpuState
    previous: GpuState | None
    reason: str | None
    time: float


class ServerChange(_Told):
    """A server of a model changed its state. ``time`` in seconds since 1970.

    ``server_id`` is the model's id, or ``model#2`` and so on for further servers of it.
    """

    kind: Literal["server"] = "server"
    server_id: str
    model_id: str
    state: ServerState
    previous: ServerState | None
    gpu_ids: list[Annotated[int, Field(ge=0)]]
    reason: str | None
    time: float


class Dropped(_Told):
    """So many changes were lost because the listener was too slow."""

    kind: Literal["dropped"] = "dropped"
    count: Annotated[int, Field(gt=0)]


Change = GpuChange | ServerChange


def gpu_state(gpu: Gpu, residents: Iterable[Resident]) -> GpuState:
    """The state that the health contract names: in error, a GPU takes no model."""
    if gpu.health == "lost" or gpu.free_bytes is None:
        return "error"
    return "assigned" if any(gpu.uuid in r.assignment.bytes_by_gpu for r in residents) else "available"


_SERVER_STATES: Mapping[ResidentState, ServerState] = {
    ResidentState.LOADING: "starting",
    ResidentState.READY: "running",
    ResidentState.STOPPING: "stopping",
}


def server_state(resident: Resident) -> ServerState | None:
    """The contract's word; None for a model that still waits for room."""
    failed = resident.leaves_for in (LeavesFor.GPU_LOST, LeavesFor.ENDED)
    if failed and resident.state is ResidentState.STOPPING:
        return "error"
    return _SERVER_STATES.get(resident.state)


class Listener:
    """What one listener has not heard yet."""

    def __init__(self, limit: int) -> None:
        self._changes: deque[Change] = deque()
        self._limit = limit
        self._dropped = 0
        self._closed = False
        self._news = asyncio.Event()

    def tell(self, change: Change) -> None:
        """Keep a change for the listener, at the cost of the oldest one if need be."""
        if len(self._changes) >= self._limit:
            self._changes.popleft()
            self._dropped += 1
        self._changes.append(change)
        self._news.set()

    def close(self) -> None:
        """There will be no more changes."""
        self._closed = True
        self._news.set()

    async def next(self) -> Change | Dropped | None:
        """Wait for the next change, or for the word that some were lost; None at the end."""
        while not self._changes and not self._closed:
            self._news.clear()
            await self._news.wait()
        if self._dropped:
            count, self._dropped = self._dropped, 0
            return Dropped(count=count)
        return self._changes.popleft() if self._changes else None


class StateChanges:
    """Compares states with the last ones and tells every listener what changed."""

    def __init__(self) -> None:
        self._gpus: dict[str, GpuChange] = {}
        self._servers: dict[str, tuple[Resident, ServerChange]] = {}
        self._failures: dict[str, str] = {}
        self._listeners: set[Listener] = set()
        self._closed = False

    def server_failed(self, server: str, reason: str) -> None:
        """``server`` is about to vanish by a failure, not because it was stopped."""
        self._failures[server] = reason

    def compare(self, gpus: Sequence[Gpu], residents: Mapping[str, Resident], time: float) -> None:
        """Tell what differs from the last call: residents by server id, time in seconds since 1970."""
        changes: list[Change] = [
            *self._gpu_changes(gpus, residents, time),
            *self._server_changes(residents, time),
        ]
        for change in changes:
            for listener in self._listeners:
                listener.tell(change)

    @contextmanager
    def listen(self, limit: int = KEPT_FOR_A_SLOW_LISTENER) -> Iterator[Listener]:
        """A listener; it hears the present states first, then every change."""
        present: list[Change] = [*self._gpus.values(), *(change for _, change in self._servers.values())]
        listener = Listener(max(limit, len(present)))
        for change in present:
            listener.tell(change.model_copy(update={"previous": None}))
        self._listeners.add(listener)
        if self._closed:
            listener.close()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """End every listener's stream."""
        self._closed = True
        for listener in self._listeners:
            listener.close()

    def _gpu_changes(
        self, gpus: Sequence[Gpu], residents: Mapping[str, Resident], time: float
    ) -> Iterator[Change]:
        for gpu in gpus:
            state, before = gpu_state(gpu, residents.values()), self._gpus.get(gpu.uuid)
            if before is not None and before.state == state:
                continue
            change = GpuChange(
                id=gpu.index,
                uuid=gpu.uuid,
                state=state,
                previous=before.state if before else None,
                reason=gpu.health_reason,
                time=time,
            )
            self._gpus[gpu.uuid] = change
            yield change
        for uuid in self._gpus.keys() - {gpu.uuid for gpu in gpus}:
            gone = self._gpus.pop(uuid)
            reason = "the driver no longer lists this GPU"
            changed = {"state": "error", "previous": gone.state, "reason": reason, "time": time}
            yield gone.model_copy(update=changed)

    def _server_changes(self, residents: Mapping[str, Resident], time: float) -> Iterator[Change]:
        for server, (resident, last) in list(self._servers.items()):
            if residents.get(server) is not resident:
                del self._servers[server]
                failure = self._failures.pop(server, None)
                state = "stopped" if failure is None else "error"
                yield last.model_copy(
                    update={"state": state, "previous": last.state, "reason": failure, "time": time}
                )
        for server, resident in residents.items():
            now, before = server_state(resident), self._servers.get(server)
            if now is None or (before is not None and before[1].state == now):
                continue
            change = ServerChange(
                server_id=server,
                model_id=resident.model,
                state=now,
                previous=before[1].state if before else None,
                gpu_ids=list(resident.assignment.gpu_indices),
                reason=resident.leaves_because or resident.assignment.reason or None,
                time=time,
            )
            self._servers[server] = (resident, change)
            yield change
