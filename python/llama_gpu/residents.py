"""The values that the scheduler, its placer and the health report share. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

from llama_gpu import MemoryEstimate, Running
from llama_gpu.budget import Claim
from llama_gpu.degradation import GivenUp

__all__ = [
    "Assignment",
    "LeavesFor",
    "Placer",
    "Resident",
    "ResidentState",
    "ResidentView",
    "model_state",
]


@dataclass(frozen=True)
class Assignment:
    """Where a model goes. ``bytes_by_gpu`` and the per-device tuples are empty on the CPU.

    ``bytes_by_gpu`` is the best that is known, ``estimate`` what was reckoned without that knowledge.
    ``evict`` has the servers that must leave first. ``options`` are those that the server is started
    with, ``degraded`` what it gives up of those configured, ``host_bytes`` what it takes of host memory.
    """

    mode: str
    gpu_uuids: tuple[str, ...] = ()
    gpu_indices: tuple[int, ...] = ()
    bytes_by_gpu: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    gpu_layers: int = 0
    tensor_split: tuple[float, ...] | None = None
    evict: tuple[str, ...] = ()
    reason: str = ""
    estimate: MemoryEstimate | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    degraded: tuple[GivenUp, ...] = ()
    host_bytes: int = 0


@dataclass(frozen=True)
class ResidentView:
    """What a placer may know of a server: ``busy`` ones must not leave for the newcomer now.

    One that ``stays`` never will. ``priority`` is that of its model, or less where it does not protect it
    from this newcomer.
    """

    server: str
    model: str
    bytes_by_gpu: Mapping[str, int]
    busy: bool
    idle_seconds: float
    reload_seconds: float | None
    priority: int = 0
    stays: bool = False
    host_bytes: int = 0
    recent_requests: float | None = None

    def as_running(self, owed_by_gpu: Mapping[str, int] = MappingProxyType({})) -> Running:
        """The same as ``lg.place`` wants it; ``eviction_cost`` says what losing it costs.

        What is owed on a GPU (bytes by UUID) would not come back for anybody new.
        """
        held = {uuid: max(0, size - owed_by_gpu.get(uuid, 0)) for uuid, size in self.bytes_by_gpu.items()}
        return Running(
            self.server,
            bytes_by_gpu=held,
            busy=self.busy,
            idle_seconds=self.idle_seconds,
            priority=self.priority,
            reload_seconds=self.reload_seconds,
            recent_requests=self.recent_requests,
        )


class Placer(Protocol):
    """Decides where a model goes, given what is resident; raises ``DoesNotFitError``."""

    def __call__(
        self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim], /
    ) -> Assignment:
        """Where ``model`` goes and who leaves for it; raises ``LlamaGpuError`` where it cannot.

        Where ``residents`` has servers of the same model, it is another of them, on GPUs of its own.
        """
        ...


class ResidentState(StrEnum):
    """``MAKING_ROOM``: decided, waiting for others to leave. The rest as llama-swap's words."""

    MAKING_ROOM = "making_room"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


def model_state(servers: Iterable[Resident]) -> str:
    """The state of a model: that of its furthest server, ``"unloaded"`` where it has none."""
    furthest = (
        ResidentState.READY,
        ResidentState.LOADING,
        ResidentState.MAKING_ROOM,
        ResidentState.STOPPING,
    )
    states = {server.state for server in servers}
    return next((state.value for state in furthest if state in states), "unloaded")


class LeavesFor(StrEnum):
    """Why a server leaves: for another model, after idle time, on request, with its GPU, by itself."""

    ROOM = "room"
    IDLE = "idle"
    ASKED = "asked"
    GPU_LOST = "gpu_lost"
    ENDED = "ended"


@dataclass
class Resident:
    """One server that holds, or is promised, memory. ``server`` is its id: by default the model's."""

    model: str
    state: ResidentState
    assignment: Assignment
    since: float
    server: str = ""
    pid: int | None = None
    ready_at: float | None = None
    active: set[int] = field(default_factory=set)
    last_used: float = 0.0
    draining: bool = False
    leaves_because: str = ""
    leaves_for: LeavesFor = LeavesFor.ASKED
    waits_for: set[str] = field(default_factory=set)
    measured_by_gpu: Mapping[str, int] | None = None

    def __post_init__(self) -> None:  # noqa: D105
        self.server = self.server or self.model

    @property
    def leaving(self) -> bool:
        """Whether it takes no more requests."""
        return self.draining or self.state is ResidentState.STOPPING

    @property
    def bytes_by_gpu(self) -> Mapping[str, int]:
        """The claim, in bytes by GPU UUID: measured where known, else the estimate."""
        return self.assignment.bytes_by_gpu if self.measured_by_gpu is None else self.measured_by_gpu

    @property
    def claim(self) -> Claim:
        """This resident's entry in the sum that no GPU may exceed."""
        return Claim(
            self.bytes_by_gpu,
            self.pid,
            settled=self.state is ResidentState.READY,
            host_bytes=self.assignment.host_bytes,
            server=self.server,
        )
